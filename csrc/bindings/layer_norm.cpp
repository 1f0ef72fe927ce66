#include "bindings.h"

namespace py = pybind11;

namespace fastldm {
namespace {

void layer_norm(const std::string& isa, Address result, Address x, const std::string& type, int64_t rows,
                int64_t channels, Address weight, Address bias, const std::string& affine_type, double eps,
                Address scale, int64_t scale_stride, Address shift, int64_t shift_stride, int64_t rows_a_modulation,
                int threads) {
    require(rows > 0 && channels > 0, "rows and channels are positive");
    require(rows_a_modulation > 0, "a modulation is that of one row or more");
    require(threads > 0, "threads are positive");
    LayerNorm a{};
    a.x = pointer<const void>(x);
    a.result = pointer<void>(result);
    a.weight = pointer<const void>(weight);
    a.bias = pointer<const void>(bias);
    a.scale = pointer<const void>(scale);
    a.shift = pointer<const void>(shift);
    a.rows = rows, a.channels = channels;
    a.scale_stride = scale_stride, a.shift_stride = shift_stride, a.rows_a_modulation = rows_a_modulation;
    a.eps = eps;
    a.type = parse_type(type);
    a.affine_type = parse_type(affine_type);
    require(a.type == Type::bfloat16 || a.affine_type == Type::float32, "float32 has a float32 weight and bias");
    a.threads = threads;
    kernels_of(isa).layer_norm(a);
}

}  // namespace

void bind_layer_norm(py::module_& module) {
    using py::arg;
    module.def("layer_norm", &layer_norm, py::call_guard<py::gil_scoped_release>(), arg("isa"), arg("result"), arg("x"),
               arg("type"), arg("rows"), arg("channels"), arg("weight"), arg("bias"), arg("affine_type"), arg("eps"),
               arg("scale"), arg("scale_stride"), arg("shift"), arg("shift_stride"), arg("rows_a_modulation"),
               arg("threads"), "Layer norm of dense [rows, channels]; an address of 0 leaves its factor or term out.");
}

}  // namespace fastldm
