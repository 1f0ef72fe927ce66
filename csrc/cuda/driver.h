// Compiled kernels that are launched through the CUDA driver. The driver is opened at the first use, so that a module
// which holds this also loads without one.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fastldm {

// How the driver makes the tensor map of one parameter: a tile of `block` elements, slowest axis first.
struct TileShape {
    CUtensorMapDataType type;
    int64_t element_size;
    CUtensorMapSwizzle swizzle;
    std::vector<uint32_t> block;
};

// What a tensor map is made of: sizes and strides count elements, slowest axis first.
struct MappedTensor {
    uint64_t address;
    std::vector<uint64_t> sizes, strides;
};

// A kernel on the device that was given, for as long as the process lives.
//
// `letters` are its parameters: p an address, i and l integers of 32 and 64 bits, f float32, T a tensor map. A launch
// gives the first of them; those it leaves out are addresses, and null.
class CompiledKernel {
  public:
    CompiledKernel(int device, const std::string& code, const std::string& name, std::string letters, int warps,
                   int shared, bool overlaps, std::vector<TileShape> tiles);

    // `grid` blocks on the stream; nothing where one of the three is 0. A value is the parameter as it lies in memory,
    // anything for a tensor map: these are made of `tensors`, in turn.
    void launch(CUstream stream, const unsigned (&grid)[3], const std::vector<uint64_t>& values,
                const std::vector<MappedTensor>& tensors) const;

    const std::string& letters() const { return letters_; }

  private:
    std::string letters_;
    unsigned threads_, shared_;
    bool overlaps_;  // it may start before the kernel in front of it has ended (programmatic dependent launch)
    std::vector<TileShape> tiles_;
    CUcontext context_ = nullptr;
    CUfunction function_ = nullptr;
};

}  // namespace fastldm
