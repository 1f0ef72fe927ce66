#include "bindings.h"

namespace py = pybind11;

namespace fastldm {
namespace {

void geglu(const std::string& isa, Address result, Address x, const std::string& type, int64_t rows, int64_t channels,
           int threads) {
    require(rows > 0 && channels > 0, "rows and channels are positive");
    require(threads > 0, "threads are positive");
    kernels_of(isa).geglu({pointer<const void>(x), pointer<void>(result), rows, channels, parse_type(type), threads});
}

}  // namespace

void bind_geglu(py::module_& module) {
    using py::arg;
    module.def("geglu", &geglu, py::call_guard<py::gil_scoped_release>(), arg("isa"), arg("result"), arg("x"),
               arg("type"), arg("rows"), arg("channels"), arg("threads"),
               "h gelu(g) [rows, channels] of dense [h, g] [rows, 2 channels].");
}

}  // namespace fastldm
