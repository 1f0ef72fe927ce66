// The Python module fastldm._cuda: CUDA kernels on raw device pointers and a stream, with no torch headers. The CUDA
// runtime is linked in and looks for the driver at the first call, so that the module also imports without one.
// fastldm/ops/cuda checks the tensors and calls these; addresses are integers, sizes and strides count elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "driver.h"
#include "kernels.h"

namespace py = pybind11;

namespace fastldm {
namespace {

using Address = std::uintptr_t;
using Strides = std::tuple<Address, int64_t, int64_t, int64_t>;  // address, slot, channel, pixel

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

Type parse_type(const std::string& name) {
    if (name == "float32") return Type::float32;
    if (name == "float16") return Type::float16;
    require(name == "bfloat16", "a dtype is float32, bfloat16 or float16");
    return Type::bfloat16;
}

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

GroupNormSilu group_norm(const std::string& type, int64_t rows, int64_t pixels, int64_t channels, int groups,
                         int groups_per_slice, int splits) {
    require(rows > 0 && rows < 65536 && pixels > 0 && channels > 0, "rows, pixels and channels are positive");
    require(groups > 0 && channels % groups == 0, "channels are a multiple of groups");
    require(groups_per_slice > 0 && groups % groups_per_slice == 0, "groups are a multiple of groups_per_slice");
    require(splits == 1 || splits == 2 || splits == 4 || splits == 8, "splits are 1, 2, 4 or 8");
    GroupNormSilu a{};
    a.rows = rows, a.pixels = pixels, a.channels = channels;
    a.groups = groups, a.groups_per_slice = groups_per_slice, a.splits = splits;
    a.type = parse_type(type);
    const int64_t bytes = channels / groups * groups_per_slice * (a.type == Type::float32 ? 4 : 2);
    require(bytes % 16 == 0 && bytes <= 4096, "a slice is 1 to 256 times 16 bytes wide");
    return a;
}

int64_t group_norm_silu_shared(const std::string& type, int64_t pixels, int64_t channels, int groups,
                               int groups_per_slice, int splits) {
    return shared_bytes(group_norm(type, 1, pixels, channels, groups, groups_per_slice, splits));
}

void group_norm_silu(Address stream, Address result, Address x, const std::string& type, int64_t rows, int64_t pixels,
                     int64_t channels, Address weight, Address bias, const std::string& affine_type,
                     std::optional<std::tuple<Address, std::string, int64_t>> row_bias, int groups, double eps,
                     bool silu, int groups_per_slice, int splits) {
    GroupNormSilu a = group_norm(type, rows, pixels, channels, groups, groups_per_slice, splits);
    a.x = pointer<const void>(x);
    a.result = pointer<void>(result);
    a.weight = pointer<const void>(weight);
    a.bias = pointer<const void>(bias);
    a.affine_type = parse_type(affine_type);
    if (row_bias) {
        const auto& [address, its_type, stride] = *row_bias;
        a.row_bias = pointer<const void>(address);
        a.row_bias_type = parse_type(its_type);
        a.row_bias_stride = stride;
    }
    a.eps = static_cast<float>(eps);
    a.silu = silu;
    check(launch(a, pointer<CUstream_st>(stream)));
}

Plane plane(const Strides& strides) {
    const auto& [address, slot, channel, pixel] = strides;
    return {pointer<void>(address), slot, channel, pixel};
}

void guided_step(Address stream, Strides latents, Strides x0, Strides model_input, Strides out,
                 std::optional<Strides> noise, const std::string& type, int64_t slots, int64_t channels, int64_t pixels,
                 bool twice, bool guided, Address table, int64_t table_slot, int64_t table_rows, int64_t columns,
                 Address step) {
    require(slots > 0 && channels > 0 && pixels > 0, "slots, channels and pixels are positive");
    require(slots * channels * pixels <= int64_t(1) << 38, "there are at most 2^38 elements");
    require(columns >= 9, "a sampler table has at least nine columns");
    GuidedStep a{};
    a.latents = plane(latents);
    a.x0 = plane(x0);
    a.model_input = plane(model_input);
    a.out = plane(out);
    if (noise) a.noise = plane(*noise);
    a.table = pointer<const float>(table);
    a.step = pointer<const int64_t>(step);
    a.slots = slots, a.channels = channels, a.pixels = pixels;
    a.table_slot = table_slot, a.table_rows = table_rows, a.columns = columns;
    a.twice = twice;
    a.guided = guided;
    a.type = parse_type(type);
    check(launch(a, pointer<CUstream_st>(stream)));
}

using Tile = std::tuple<int, int64_t, int, std::vector<uint32_t>>;  // type, bytes an element, swizzle, block

CompiledKernel compiled_kernel(int device, const py::bytes& code, const std::string& name, const std::string& letters,
                               int warps, int shared, bool overlaps, const std::vector<Tile>& tiles) {
    std::vector<TileShape> shapes;
    for (const auto& [type, size, swizzle, block] : tiles)
        shapes.push_back(
            {static_cast<CUtensorMapDataType>(type), size, static_cast<CUtensorMapSwizzle>(swizzle), block});
    const std::string held = code;
    py::gil_scoped_release release;
    return {device, held, name, letters, warps, shared, overlaps, std::move(shapes)};
}

void launch_compiled(const CompiledKernel& kernel, Address stream, const py::tuple& grid, const py::sequence& given) {
    require(grid.size() >= 1 && grid.size() <= 3, "a grid has one to three axes");
    unsigned blocks[3] = {1, 1, 1};
    for (size_t i = 0; i < grid.size(); ++i) blocks[i] = grid[i].cast<unsigned>();
    const std::string& letters = kernel.letters();
    require(given.size() <= letters.size(), "there are more values than parameters");
    std::vector<uint64_t> values(given.size());
    std::vector<MappedTensor> tensors;
    for (size_t i = 0; i < values.size(); ++i) {
        const py::object value = given[i];
        if (letters[i] == 'f') {
            const float number = value.cast<float>();
            std::memcpy(&values[i], &number, sizeof number);
        } else if (letters[i] == 'T') {
            auto [address, sizes, strides] =
                value.cast<std::tuple<Address, std::vector<uint64_t>, std::vector<uint64_t>>>();
            tensors.push_back({address, std::move(sizes), std::move(strides)});
        } else if (letters[i] == 'i') {
            values[i] = static_cast<uint32_t>(value.cast<int32_t>());
        } else {
            values[i] = letters[i] == 'l' ? static_cast<uint64_t>(value.cast<int64_t>()) : value.cast<uint64_t>();
        }
    }
    py::gil_scoped_release release;
    kernel.launch(pointer<CUstream_st>(stream), blocks, values, tensors);
}

}  // namespace
}  // namespace fastldm

PYBIND11_MODULE(_cuda, module) {
    using py::arg;
    module.doc() = "CUDA kernels of fastldm on raw pointers; call them through fastldm.ops.";
    module.def("group_norm_silu_shared", &fastldm::group_norm_silu_shared, arg("type"), arg("pixels"), arg("channels"),
               arg("groups"), arg("groups_per_slice"), arg("splits"), "Shared memory of one block, in bytes.");
    module.def("group_norm_silu", &fastldm::group_norm_silu, py::call_guard<py::gil_scoped_release>(), arg("stream"),
               arg("result"), arg("x"), arg("type"), arg("rows"), arg("pixels"), arg("channels"), arg("weight"),
               arg("bias"), arg("affine_type"), arg("row_bias"), arg("groups"), arg("eps"), arg("silu"),
               arg("groups_per_slice"), arg("splits"),
               "silu(group_norm(x + row_bias)) of dense channels-last memory [rows, pixels, channels].");
    module.def("guided_step", &fastldm::guided_step, py::call_guard<py::gil_scoped_release>(), arg("stream"),
               arg("latents"), arg("x0"), arg("model_input"), arg("out"), arg("noise"), arg("type"), arg("slots"),
               arg("channels"), arg("pixels"), arg("twice"), arg("guided"), arg("table"), arg("table_slot"),
               arg("table_rows"), arg("columns"), arg("step"),
               "One row of each slot's sampler table, in place; a tensor is (address, slot, channel, pixel strides).");
    py::class_<fastldm::CompiledKernel>(module, "CompiledKernel",
                                        "A kernel that another compiler made, on one device, for good.")
        .def(py::init(&fastldm::compiled_kernel), arg("device"), arg("code"), arg("name"), arg("letters"), arg("warps"),
             arg("shared"), arg("overlaps"), arg("tiles"),
             "`letters` are the parameters: p address, i and l integers of 32 and 64 bits, f float32, T tensor map, "
             "which takes a tile (CUtensorMapDataType, bytes an element, CUtensorMapSwizzle, block).")
        .def("launch", &fastldm::launch_compiled, arg("stream"), arg("grid"), arg("values"),
             "One value a parameter, (address, sizes, strides) for a tensor map; the last addresses may be left out.");
}
