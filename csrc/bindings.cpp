// The Python module fastldm._C: kernels on raw pointers, with no torch headers, so that one build serves every torch.
// fastldm/ops/cpp.py checks the tensors and calls these; addresses are integers, sizes and strides count elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"

namespace py = pybind11;

namespace fastldm {
namespace {

using Address = std::uintptr_t;
using Strides = std::tuple<Address, int64_t, int64_t, int64_t>;  // address, slot, channel, pixel

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// rows x channels numbers as float32; `stride` elements between rows.
std::vector<float> floats(Address address, const std::string& type, int64_t rows, int64_t channels, int64_t stride) {
    std::vector<float> values(static_cast<size_t>(rows * channels));
    const bool wide = parse_type(type) == Type::float32;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < channels; ++c) {
            float& value = values[static_cast<size_t>(row * channels + c)];
            if (wide) {
                value = pointer<const float>(address)[row * stride + c];
            } else {
                const uint32_t bits = uint32_t(pointer<const uint16_t>(address)[row * stride + c]) << 16;
                std::memcpy(&value, &bits, sizeof value);
            }
        }
    return values;
}

void group_norm_silu(const std::string& isa, Address result, Address x, const std::string& type, int64_t rows,
                     int64_t pixels, int64_t channels, Address weight, Address bias, const std::string& affine_type,
                     std::optional<std::tuple<Address, std::string, int64_t>> row_bias, int64_t groups, double eps,
                     bool silu, int threads) {
    require(rows > 0 && pixels > 0 && channels > 0, "rows, pixels and channels are positive");
    require(groups > 0 && channels % groups == 0, "channels are a multiple of groups");
    require(threads > 0, "threads are positive");
    const Kernels& kernels = kernels_of(isa);
    const Type element = parse_type(type);
    const std::vector<float> weights = floats(weight, affine_type, 1, channels, channels);
    const std::vector<float> biases = floats(bias, affine_type, 1, channels, channels);
    std::vector<float> row_biases;
    if (row_bias) {
        const auto& [address, its_type, stride] = *row_bias;
        row_biases = floats(address, its_type, rows, channels, stride);
    }
    const size_t numbers = static_cast<size_t>(rows * channels);
    const auto blocks = static_cast<size_t>(GroupNormSilu::blocks(pixels));
    std::vector<float> block_moments(numbers * 3 * blocks), coefficients(numbers * 3);
    std::vector<double> channel_moments(numbers * 2);

    GroupNormSilu a{};
    a.x = pointer<const void>(x);
    a.result = pointer<void>(result);
    a.weight = weights.data();
    a.bias = biases.data();
    a.row_bias = row_bias ? row_biases.data() : nullptr;
    a.block_moments = block_moments.data();
    a.channel_moments = channel_moments.data();
    a.coefficients = coefficients.data();
    a.rows = rows, a.pixels = pixels, a.channels = channels, a.groups = groups;
    a.eps = eps;
    a.silu = silu;
    a.type = element;
    a.threads = threads;
    kernels.group_norm_silu(a);
}

Plane plane(const Strides& strides) {
    const auto& [address, slot, channel, pixel] = strides;
    return {pointer<void>(address), slot, channel, pixel};
}

void guided_step(const std::string& isa, Strides latents, Strides x0, Strides model_input, Strides out,
                 std::optional<Strides> noise, const std::string& type, int64_t slots, int64_t channels, int64_t pixels,
                 int64_t copies, bool guided, Address table, int64_t table_slot, int64_t table_rows, int64_t columns,
                 Address step, int threads) {
    require(slots > 0 && channels > 0 && pixels > 0, "slots, channels and pixels are positive");
    require(copies == 1 || copies == 2, "copies are 1 or 2");
    require(columns >= 9, "a sampler table has at least nine columns");
    require(threads > 0, "threads are positive");
    const Kernels& kernels = kernels_of(isa);
    const Type element = parse_type(type);
    const auto* rows = pointer<const int64_t>(step);
    for (int64_t slot = 0; slot < slots; ++slot)
        if (rows[slot] < 0 || rows[slot] >= table_rows)
            throw std::out_of_range("step " + std::to_string(rows[slot]) + " of a sampler table with " +
                                    std::to_string(table_rows) + " rows");

    GuidedStep a{};
    a.latents = plane(latents);
    a.x0 = plane(x0);
    a.model_input = plane(model_input);
    a.out = plane(out);
    if (noise) a.noise = plane(*noise);
    a.table = pointer<const float>(table);
    a.step = rows;
    a.slots = slots, a.channels = channels, a.pixels = pixels;
    a.table_slot = table_slot, a.columns = columns;
    a.copies = copies;
    a.guided = guided;
    a.type = element;
    a.threads = threads;
    kernels.guided_step(a);
}

}  // namespace
}  // namespace fastldm

PYBIND11_MODULE(_C, module) {
    using py::arg;
    module.doc() = "Compiled kernels of fastldm on raw pointers; call them through fastldm.ops.";
    module.def("isas", &fastldm::isas, "Instruction sets with kernels that run on this CPU, narrowest first.");
    module.def("group_norm_silu", &fastldm::group_norm_silu, py::call_guard<py::gil_scoped_release>(), arg("isa"),
               arg("result"), arg("x"), arg("type"), arg("rows"), arg("pixels"), arg("channels"), arg("weight"),
               arg("bias"), arg("affine_type"), arg("row_bias"), arg("groups"), arg("eps"), arg("silu"), arg("threads"),
               "silu(group_norm(x + row_bias)) of dense channels-last memory [rows, pixels, channels].");
    module.def("guided_step", &fastldm::guided_step, py::call_guard<py::gil_scoped_release>(), arg("isa"),
               arg("latents"), arg("x0"), arg("model_input"), arg("out"), arg("noise"), arg("type"), arg("slots"),
               arg("channels"), arg("pixels"), arg("copies"), arg("guided"), arg("table"), arg("table_slot"),
               arg("table_rows"), arg("columns"), arg("step"), arg("threads"),
               "One row of each slot's sampler table, in place; a tensor is (address, slot, channel, pixel strides).");
}
