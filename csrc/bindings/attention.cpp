#include <algorithm>
#include <cmath>
#include <memory>

#include "bindings.h"

namespace py = pybind11;

namespace fastldm {
namespace {

using Strides = std::tuple<Address, int64_t, int64_t, int64_t>;  // address, row, head, token

constexpr int64_t PACKED = 1 << 17;      // floats of packed keys and values a thread, what its cache holds; or one head
constexpr int64_t PER_THREAD = 1 << 19;  // multiplications that pay for waking a thread

Heads heads_of(const Strides& strides) {
    const auto& [address, row, head, token] = strides;
    return {pointer<void>(address), row, head, token};
}

void attention(const std::string& isa, const Strides& result, const Strides& q, const Strides& k, const Strides& v,
               const std::string& type, int64_t rows, int64_t heads, int64_t queries, int64_t keys, int64_t head_dim,
               Address key_lengths, bool causal, bool pairs, int threads) {
    require(rows > 0 && heads > 0 && queries > 0 && keys > 0, "rows, heads, queries and keys are positive");
    require(head_dim > 0 && head_dim % 8 == 0 && head_dim <= Attention::HEAD_DIM,
            "a head dim is a multiple of 8, at most 512");
    require(threads > 0, "threads are positive");
    const Kernels& kernels = kernels_of(isa);

    Attention a{};
    a.q = heads_of(q), a.k = heads_of(k), a.v = heads_of(v), a.result = heads_of(result);
    a.key_lengths = pointer<const int64_t>(key_lengths);
    a.rows = rows, a.heads = heads, a.queries = queries, a.keys = keys, a.head_dim = head_dim;
    a.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(head_dim)));  // log2 e: for 2^x
    a.causal = causal;
    a.pairs = pairs;
    a.type = parse_type(type);
    const int64_t useful = 1 + rows * heads * queries * keys * head_dim * 2 / PER_THREAD;
    a.threads = static_cast<int>(std::min<int64_t>(threads, useful));
    a.group = std::clamp(PACKED * a.threads / a.packed_size(), int64_t{1}, rows * heads);
    const std::unique_ptr<float[]> packed(new float[static_cast<size_t>(a.group * a.packed_size())]);  // no zeros
    a.packed = packed.get();
    kernels.attention(a);
}

}  // namespace

void bind_attention(py::module_& module) {
    using py::arg;
    module.def("attention", &attention, py::call_guard<py::gil_scoped_release>(), arg("isa"), arg("result"), arg("q"),
               arg("k"), arg("v"), arg("type"), arg("rows"), arg("heads"), arg("queries"), arg("keys"), arg("head_dim"),
               arg("key_lengths"), arg("causal"), arg("pairs"), arg("threads"),
               "softmax(q k^T / sqrt(head_dim)) v; a tensor is (address, row, head, token strides).");
}

}  // namespace fastldm
