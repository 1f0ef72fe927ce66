#include <memory>

#include "bindings.h"

namespace py = pybind11;

namespace fastldm {
namespace {

// Scratch that the kernel writes before it reads it.
template <typename T>
std::unique_ptr<T[]> uninitialised(int64_t numbers) {
    return std::unique_ptr<T[]>(new T[static_cast<size_t>(numbers)]);
}

void group_norm_silu_backward(const std::string& isa, Address grad_x, Address grad_affine, Address grad_row_bias,
                              Address grad, Address x, const std::string& type, int64_t rows, int64_t pixels,
                              int64_t channels, Address moments, Address weight, Address bias, Address row_bias,
                              int64_t groups, double eps, bool silu, int threads) {
    require(rows > 0 && pixels > 0 && channels > 0, "rows, pixels and channels are positive");
    require(groups > 0 && channels % groups == 0, "channels are a multiple of groups");
    require(threads > 0, "threads are positive");
    const Kernels& kernels = kernels_of(isa);
    const int64_t numbers = rows * channels;
    const auto blocks = uninitialised<float>(numbers * 2 * GroupNormSiluBackward::blocks_of(pixels));
    const auto coefficients = uninitialised<float>(numbers * GroupNormSiluBackward::COEFFICIENTS);
    const auto rstd = uninitialised<double>(rows * groups), sums = uninitialised<double>(numbers * 2);

    GroupNormSiluBackward a{};
    a.x = pointer<const void>(x);
    a.grad = pointer<const void>(grad);
    a.grad_x = pointer<void>(grad_x);
    a.grad_affine = pointer<float>(grad_affine);
    a.grad_row_bias = pointer<float>(grad_row_bias);
    a.moments = pointer<const float>(moments);
    a.weight = pointer<const float>(weight);
    a.bias = pointer<const float>(bias);
    a.row_bias = pointer<const float>(row_bias);
    a.blocks = blocks.get();
    a.coefficients = coefficients.get();
    a.rstd = rstd.get();
    a.sums = sums.get();
    a.rows = rows, a.pixels = pixels, a.channels = channels, a.groups = groups;
    a.eps = eps;
    a.silu = silu;
    a.type = parse_type(type);
    a.threads = threads;
    kernels.group_norm_silu_backward(a);
}

}  // namespace

void bind_group_norm_silu_backward(py::module_& module) {
    using py::arg;
    module.def(
        "group_norm_silu_backward", &group_norm_silu_backward, py::call_guard<py::gil_scoped_release>(), arg("isa"),
        arg("grad_x"), arg("grad_affine"), arg("grad_row_bias"), arg("grad"), arg("x"), arg("type"), arg("rows"),
        arg("pixels"), arg("channels"), arg("moments"), arg("weight"), arg("bias"), arg("row_bias"), arg("groups"),
        arg("eps"), arg("silu"), arg("threads"),
        "The gradients of silu(group_norm(x + row_bias)) of dense channels-last memory [rows, pixels, channels]; "
        "all but x, grad and grad_x float32: moments [rows, 2, channels], weight, bias, row_bias (or 0), and what "
        "is written: grad_affine [2, channels], of bias, then of weight, and grad_row_bias.");
}

}  // namespace fastldm
