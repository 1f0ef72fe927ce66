#include <algorithm>

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

// The weight [outputs, channels, window] as Convolve wants it.
void pack_panels(Address result, Address weight, int64_t outputs, int64_t channels, Sizes window,
                 std::tuple<int64_t, int64_t, int64_t, int64_t> strides, int threads) {
    constexpr int64_t PANEL = Convolve::PANEL;
    const auto [height, width] = window;
    require(outputs > 0 && channels > 0 && height > 0 && width > 0, "outputs, channels and window are positive");
    require(threads > 0, "threads are positive");
    const auto [output, channel, line, column] = strides;
    const int64_t depth = height * width * channels, panels = (outputs + PANEL - 1) / PANEL;
    float* packed = pointer<float>(result);
    const float* from = pointer<const float>(weight);
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t k = 0; k < depth; ++k) {
            const int64_t tap = k / channels;
            const float* number =
                from + panel * PANEL * output + k % channels * channel + tap / width * line + tap % width * column;
            float* to = packed + (panel * depth + k) * PANEL;
            const int64_t count = std::min(PANEL, outputs - panel * PANEL);
            for (int64_t i = 0; i < count; ++i) to[i] = number[i * output];
            std::fill(to + count, to + PANEL, 0.0f);
        }
}

}  // namespace

void bind_convolve(py::module_& module) {
    using py::arg;
    module.def("convolve", &convolve, py::call_guard<py::gil_scoped_release>(), arg("isa"), arg("result"), arg("x"),
               arg("weight"), arg("bias"), arg("residual"), arg("maps"), arg("size"), arg("channels"), arg("outputs"),
               arg("window"), arg("stride"), arg("padding"), arg("result_size"), arg("threads"),
               "float32 convolution of dense channels-last x by a packed weight, plus bias and a residual placed like "
               "the result (address, map, line, pixel strides); an address of 0 leaves its term out.");
    module.def("pack_panels", &pack_panels, py::call_guard<py::gil_scoped_release>(), arg("result"), arg("weight"),
               arg("outputs"), arg("channels"), arg("window"), arg("strides"), arg("threads"),
               "The float32 weight as convolve wants it: panels of 32 outputs, the last filled up with zeros.");
}

}  // namespace fastldm
