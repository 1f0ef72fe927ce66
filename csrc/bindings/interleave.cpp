#include <array>

#include "bindings.h"

namespace py = pybind11;

namespace fastldm {
namespace {

void interleave(const std::string& isa, Address result, const std::array<Address, 4>& phases, int64_t rows,
                int64_t width, int64_t bytes, int threads) {
    require(rows > 0 && width > 0 && bytes > 0, "rows, width and bytes are positive");
    require(threads > 0, "threads are positive");
    Interleave a{};
    for (size_t phase = 0; phase < 4; ++phase) a.phases[phase / 2][phase % 2] = pointer<const void>(phases[phase]);
    a.result = pointer<void>(result);
    a.rows = rows, a.width = width, a.bytes = bytes;
    a.threads = threads;
    kernels_of(isa).interleave(a);
}

}  // namespace

void bind_interleave(py::module_& module) {
    using py::arg;
    module.def("interleave", &interleave, py::call_guard<py::gil_scoped_release>(), arg("isa"), arg("result"),
               arg("phases"), arg("rows"), arg("width"), arg("bytes"), arg("threads"),
               "Four maps [rows, width] of pixels of so many bytes to one of twice the height and width.");
}

}  // namespace fastldm
