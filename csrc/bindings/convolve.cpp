#include "bindings.h"

namespace py = pybind11;

namespace fastldm {
namespace {

using Sizes = std::tuple<int64_t, int64_t>;                     // lines, columns
using Result = std::tuple<Address, int64_t, int64_t, int64_t>;  // address, map, line and pixel strides

void convolve(const std::string& isa, const Result& result, Address x, Address weight, Address bias, Address residual,
              int64_t maps, Sizes size, int64_t channels, int64_t outputs, Sizes window, int64_t stride, Sizes padding,
              Sizes result_size, int threads) {
    Convolve a{};
    std::tie(a.height, a.width) = size;
    std::tie(a.window_height, a.window_width) = window;
    std::tie(a.top, a.left) = padding;
    std::tie(a.out_height, a.out_width) = result_size;
    require(maps > 0 && a.height > 0 && a.width > 0 && channels > 0, "maps, sizes and channels are positive");
    require(outputs > 0 && a.window_height > 0 && a.window_width > 0, "outputs and window are positive");
    require(stride > 0 && a.top >= 0 && a.left >= 0, "stride is positive, padding is not negative");
    require(a.out_height > 0 && a.out_width > 0, "the result has pixels");
    require(threads > 0, "threads are positive");
    a.x = pointer<const float>(x);
    a.weight = pointer<const float>(weight);
    a.bias = pointer<const float>(bias);
    a.residual = pointer<const float>(residual);
    Address address;
    std::tie(address, a.result_map, a.result_line, a.result_pixel) = result;
    a.result = pointer<float>(address);
    a.maps = maps, a.channels = channels, a.outputs = outputs, a.stride = stride;
    a.threads = threads;
    kernels_of(isa).convolve(a);
}

}  // namespace

void bind_convolve(py::module_& module) {
    using py::arg;
    module.def("convolve", &convolve, py::call_guard<py::gil_scoped_release>(), arg("isa"), arg("result"), arg("x"),
               arg("weight"), arg("bias"), arg("residual"), arg("maps"), arg("size"), arg("channels"), arg("outputs"),
               arg("window"), arg("stride"), arg("padding"), arg("result_size"), arg("threads"),
               "float32 convolution of dense channels-last x by a packed weight, plus bias and a residual placed like "
               "the result (address, map, line, pixel strides); an address of 0 leaves its term out.");
}

}  // namespace fastldm
