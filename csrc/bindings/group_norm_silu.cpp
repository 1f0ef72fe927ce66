#include <cstring>
#include <memory>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace fastldm {
namespace {

// Scratch that the kernels' threads write before they read it: clearing it here would take one of them longer.
std::unique_ptr<float[]> uninitialised(size_t numbers) { return std::unique_ptr<float[]>(new float[numbers]); }

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

// Mean and variance of x, double [rows, 2, channels].
std::vector<double> moments_of(const Kernels& kernels, Address x, Type type, int64_t rows, int64_t pixels,
                               int64_t channels, int threads) {
    const size_t numbers = static_cast<size_t>(rows * channels);
    std::vector<double> moments(numbers * 2);
    const auto blocks = uninitialised(numbers * 3 * static_cast<size_t>(ChannelMoments::blocks_of(pixels)));
    kernels.channel_moments(
        {pointer<const void>(x), moments.data(), blocks.get(), rows, pixels, channels, type, threads});
    return moments;
}

void require_sizes(int64_t rows, int64_t pixels, int64_t channels, int threads) {
    require(rows > 0 && pixels > 0 && channels > 0, "rows, pixels and channels are positive");
    require(threads > 0, "threads are positive");
}

void channel_moments(const std::string& isa, Address result, Address x, const std::string& type, int64_t rows,
                     int64_t pixels, int64_t channels, int threads) {
    require_sizes(rows, pixels, channels, threads);
    const auto moments = moments_of(kernels_of(isa), x, parse_type(type), rows, pixels, channels, threads);
    for (size_t i = 0; i < moments.size(); ++i) pointer<float>(result)[i] = static_cast<float>(moments[i]);
}

void group_norm_silu(const std::string& isa, Address result, Address x, const std::string& type, int64_t rows,
                     int64_t pixels, int64_t channels, Address weight, Address bias, const std::string& affine_type,
                     std::optional<std::tuple<Address, std::string, int64_t>> row_bias, int64_t groups, double eps,
                     bool silu, Address moments, int threads) {
    require_sizes(rows, pixels, channels, threads);
    require(groups > 0 && channels % groups == 0, "channels are a multiple of groups");
    const Kernels& kernels = kernels_of(isa);
    const Type element = parse_type(type);
    const std::vector<float> weights = floats(weight, affine_type, 1, channels, channels);
    const std::vector<float> biases = floats(bias, affine_type, 1, channels, channels);
    std::vector<float> row_biases;
    if (row_bias) {
        const auto& [address, its_type, stride] = *row_bias;
        row_biases = floats(address, its_type, rows, channels, stride);
    }
    const float* given = pointer<const float>(moments);
    const std::vector<double> known = given ? std::vector<double>(given, given + rows * 2 * channels)
                                            : moments_of(kernels, x, element, rows, pixels, channels, threads);
    const auto coefficients = uninitialised(static_cast<size_t>(rows * 3 * channels));

    GroupNormSilu a{};
    a.x = pointer<const void>(x);
    a.result = pointer<void>(result);
    a.moments = known.data();
    a.weight = weights.data();
    a.bias = biases.data();
    a.row_bias = row_bias ? row_biases.data() : nullptr;
    a.coefficients = coefficients.get();
    a.rows = rows, a.pixels = pixels, a.channels = channels, a.groups = groups;
    a.eps = eps;
    a.silu = silu;
    a.type = element;
    a.threads = threads;
    kernels.group_norm_silu(a);
}

}  // namespace

void bind_group_norm_silu(py::module_& module) {
    using py::arg;
    module.def("group_norm_silu", &group_norm_silu, py::call_guard<py::gil_scoped_release>(), arg("isa"), arg("result"),
               arg("x"), arg("type"), arg("rows"), arg("pixels"), arg("channels"), arg("weight"), arg("bias"),
               arg("affine_type"), arg("row_bias"), arg("groups"), arg("eps"), arg("silu"), arg("moments"),
               arg("threads"),
               "silu(group_norm(x + row_bias)) of dense channels-last memory [rows, pixels, channels]; moments float32 "
               "[rows, 2, channels], or 0: those of x.");
    module.def("channel_moments", &channel_moments, py::call_guard<py::gil_scoped_release>(), arg("isa"), arg("result"),
               arg("x"), arg("type"), arg("rows"), arg("pixels"), arg("channels"), arg("threads"),
               "Mean and variance, float32 [rows, 2, channels], over the pixels of dense [rows, pixels, channels].");
}

}  // namespace fastldm
