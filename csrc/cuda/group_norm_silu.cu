// GroupNorm and SiLU in one pass over memory: the picture stays in the shared memory of a cluster of blocks. Clusters
// begin with compute capability 9.0, and setup.py compiles this file for nothing older.
#include <cooperative_groups.h>

#include "elements.cuh"

namespace fastldm {

namespace {

namespace cg = cooperative_groups;

constexpr int THREADS = 256, WARPS = THREADS / 32;

// How the threads of a block share its pixels × channels: a thread keeps to one column of 16 bytes.
struct Share {
    int width;    // channels of the slice
    int vectors;  // 16-byte columns
    int lanes;    // pixels that are worked on at the same time
    int pixels;   // of a block

    template <typename E>
    __host__ __device__ static Share of(const GroupNormSilu& a) {
        const int width = static_cast<int>(a.channels / a.groups) * a.groups_per_slice;
        const int vectors = width / Vector<E>::SIZE;
        return {width, vectors, THREADS / vectors, static_cast<int>((a.pixels + a.splits - 1) / a.splits)};
    }
};

// The sum over pixels, channels of a group and blocks of the cluster of what each thread has summed for its channels.
// Every block adds in the same order and gets the same numbers: totals[group].
template <int SIZE>
__device__ void sum_groups(const cg::cluster_group& cluster, const Share& share, int groups, const float (&mine)[SIZE],
                           float* partial, float* local, float* totals) {
    const int column = threadIdx.x % share.vectors, lane = threadIdx.x / share.vectors;
    if (lane < share.lanes)
        for (int i = 0; i < SIZE; ++i) partial[lane * share.width + column * SIZE + i] = mine[i];
    __syncthreads();
    const int channels = share.width / groups;
    for (int group = threadIdx.x / 32; group < groups; group += WARPS) {
        float sum = 0;
        for (int i = threadIdx.x % 32; i < share.lanes * channels; i += 32)
            sum += partial[i / channels * share.width + group * channels + i % channels];
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
        if (threadIdx.x % 32 == 0) local[group] = sum;
    }
    cluster.sync();
    for (int group = threadIdx.x; group < groups; group += THREADS) {
        float sum = 0;
        for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) sum += cluster.map_shared_rank(local, rank)[group];
        totals[group] = sum;
    }
    __syncthreads();
}

template <typename E>
__global__ void __launch_bounds__(THREADS, 2) group_norm_silu(const GroupNormSilu a) {
    constexpr int SIZE = Vector<E>::SIZE;
    const cg::cluster_group cluster = cg::this_cluster();
    const Share share = Share::of<E>(a);
    const int groups = a.groups_per_slice, group_width = share.width / groups;
    const int column = threadIdx.x % share.vectors, lane = threadIdx.x / share.vectors;
    const int64_t row = blockIdx.z, first_channel = int64_t(blockIdx.y) * share.width + column * SIZE;
    const int64_t first_pixel = int64_t(blockIdx.x) * share.pixels;
    const int pixels = static_cast<int>(min(int64_t(share.pixels), max(a.pixels - first_pixel, int64_t(0))));
    const int from = lane < share.lanes ? lane : pixels;  // threads left over by the columns have no pixels

    extern __shared__ uint4 shared[];
    auto* kept = reinterpret_cast<Vector<E>*>(shared);  // [pixels, vectors]
    auto* partial = reinterpret_cast<float*>(kept + share.pixels * share.vectors);
    float* local_sums = partial + share.lanes * share.width;
    float *local_squares = local_sums + groups, *totals = local_squares + groups;

    float row_bias[SIZE] = {};
    if (a.row_bias)
        for (int i = 0; i < SIZE; ++i)
            row_bias[i] = read(a.row_bias, row * a.row_bias_stride + first_channel + i, a.row_bias_type);

    const E* x = static_cast<const E*>(a.x) + (row * a.pixels + first_pixel) * a.channels + first_channel;
    float sums[SIZE] = {};
    for (int pixel = from; pixel < pixels; pixel += share.lanes) {
        const auto vector = *reinterpret_cast<const Vector<E>*>(x + pixel * a.channels);
        kept[pixel * share.vectors + column] = vector;
        for (int i = 0; i < SIZE; ++i) sums[i] += to_float(vector.values[i]) + row_bias[i];
    }
    sum_groups(cluster, share, groups, sums, partial, local_sums, totals);

    // Each thread goes over what it put into shared memory itself.
    const float count = static_cast<float>(a.pixels) * group_width;
    float means[SIZE], squares[SIZE] = {};
    for (int i = 0; i < SIZE; ++i) means[i] = totals[(column * SIZE + i) / group_width] / count - row_bias[i];
    for (int pixel = from; pixel < pixels; pixel += share.lanes) {
        const Vector<E>& vector = kept[pixel * share.vectors + column];
        for (int i = 0; i < SIZE; ++i) {
            const float away = to_float(vector.values[i]) - means[i];
            squares[i] += away * away;
        }
    }
    __syncthreads();  // totals have been read
    sum_groups(cluster, share, groups, squares, partial, local_squares, totals);

    float scale[SIZE], shift[SIZE];
    for (int i = 0; i < SIZE; ++i) {
        const float variance = totals[(column * SIZE + i) / group_width] / count;
        scale[i] = read(a.weight, first_channel + i, a.affine_type) * rsqrtf(variance + a.eps);
        shift[i] = read(a.bias, first_channel + i, a.affine_type);
    }
    E* result = static_cast<E*>(a.result) + (row * a.pixels + first_pixel) * a.channels + first_channel;
    for (int pixel = from; pixel < pixels; pixel += share.lanes) {
        const Vector<E>& vector = kept[pixel * share.vectors + column];
        Vector<E> made;
        for (int i = 0; i < SIZE; ++i) {
            float value = (to_float(vector.values[i]) - means[i]) * scale[i] + shift[i];
            if (a.silu) value = value / (1 + __expf(-value));
            made.values[i] = from_float<E>(value);
        }
        *reinterpret_cast<Vector<E>*>(result + pixel * a.channels) = made;
    }
    cluster.sync();  // no block leaves while another may still read its sums
}

template <typename E>
int64_t bytes(const GroupNormSilu& a) {
    const Share share = Share::of<E>(a);
    return 16 * int64_t(share.pixels) * share.vectors +
           int64_t(sizeof(float)) * (share.lanes * share.width + 3 * a.groups_per_slice);
}

template <typename E>
cudaError_t start(const GroupNormSilu& a, cudaStream_t stream) {
    const auto kernel = group_norm_silu<E>;
    const auto shared = static_cast<int>(bytes<E>(a));
    // The most there is, whatever this call needs: threads launch side by side, and the limit is the function's.
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(a.splits), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = {static_cast<unsigned>(a.splits), static_cast<unsigned>(a.groups / a.groups_per_slice),
                      static_cast<unsigned>(a.rows)};
    config.blockDim = {THREADS, 1, 1};
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, a);
}

}  // namespace

int64_t shared_bytes(const GroupNormSilu& a) {
    return with_type(a.type, [&](auto element) { return bytes<decltype(element)>(a); });
}

cudaError_t launch(const GroupNormSilu& a, cudaStream_t stream) {
    return with_type(a.type, [&](auto element) { return start<decltype(element)>(a, stream); });
}

}  // namespace fastldm
