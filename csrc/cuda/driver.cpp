#include "driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace fastldm {

namespace {

// The functions of libcuda that are used here.
struct Driver {
    decltype(&cuGetErrorString) get_error_string;
    decltype(&cuInit) init;
    decltype(&cuDeviceGet) device_get;
    decltype(&cuDevicePrimaryCtxRetain) primary_context;
    decltype(&cuCtxGetCurrent) get_current;
    decltype(&cuCtxSetCurrent) set_current;
    decltype(&cuModuleLoadData) load;
    decltype(&cuModuleGetFunction) get_function;
    decltype(&cuFuncSetAttribute) set_attribute;
    decltype(&cuFuncSetCacheConfig) set_cache;
    decltype(&cuLaunchKernelEx) launch;
    decltype(&cuTensorMapEncodeTiled) encode;

    Driver() {
        void* library = dlopen("libcuda.so.1", RTLD_NOW);
        if (!library) throw std::runtime_error(std::string("the CUDA driver cannot be opened: ") + dlerror());
        const auto find = [library](auto& function, const char* name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
            if (!function) throw std::runtime_error(std::string("the CUDA driver is too old: it has no ") + name);
        };
        find(get_error_string, "cuGetErrorString");
        find(init, "cuInit");
        find(device_get, "cuDeviceGet");
        find(primary_context, "cuDevicePrimaryCtxRetain");
        find(get_current, "cuCtxGetCurrent");
        find(set_current, "cuCtxSetCurrent");
        find(load, "cuModuleLoadData");
        find(get_function, "cuModuleGetFunction");
        find(set_attribute, "cuFuncSetAttribute");
        find(set_cache, "cuFuncSetCacheConfig");
        find(launch, "cuLaunchKernelEx");
        find(encode, "cuTensorMapEncodeTiled");
    }
};

const Driver& driver() {
    static const Driver found;
    return found;
}

void check(CUresult result, const char* what) {
    if (result == CUDA_SUCCESS) return;
    const char* why = nullptr;
    driver().get_error_string(result, &why);
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + (why ? why : "unknown error"));
}

CUtensorMap tensor_map(const TileShape& tile, const MappedTensor& tensor) {
    constexpr size_t MOST = 5;  // axes of a tensor map
    const size_t rank = tile.block.size();
    if (rank == 0 || rank > MOST || tensor.sizes.size() != rank || tensor.strides.size() != rank)
        throw std::invalid_argument("a tensor map has one to five axes, as many as its tile");
    // The driver counts the fastest axis first, and strides in bytes, without that axis.
    uint64_t sizes[MOST], strides[MOST];
    uint32_t block[MOST], steps[MOST];
    for (size_t i = 0; i < rank; ++i) {
        const size_t axis = rank - 1 - i;
        sizes[i] = tensor.sizes[axis];
        block[i] = tile.block[axis];
        steps[i] = 1;
        if (i > 0) strides[i - 1] = tensor.strides[axis] * static_cast<uint64_t>(tile.element_size);
    }
    CUtensorMap made;
    check(driver().encode(&made, tile.type, static_cast<cuuint32_t>(rank), reinterpret_cast<void*>(tensor.address),
                          sizes, strides, block, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, tile.swizzle,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
          "a tensor map cannot be made");
    return made;
}

}  // namespace

CompiledKernel::CompiledKernel(int device, const std::string& code, const std::string& name, std::string letters,
                               int warps, int shared, bool overlaps, std::vector<TileShape> tiles)
    : letters_(std::move(letters)),
      threads_(static_cast<unsigned>(32 * warps)),
      shared_(static_cast<unsigned>(shared)),
      overlaps_(overlaps),
      tiles_(std::move(tiles)) {
    if (letters_.find_first_not_of("pilfT") != std::string::npos)
        throw std::invalid_argument("the letters of parameters are p, i, l, f and T");
    if (std::count(letters_.begin(), letters_.end(), 'T') != static_cast<std::ptrdiff_t>(tiles_.size()))
        throw std::invalid_argument("there is one tile for each tensor map");
    if (warps < 1 || warps > 32 || shared < 0) throw std::invalid_argument("a block has 1 to 32 warps");
    const Driver& cuda = driver();
    CUdevice handle = 0;
    CUmodule module = nullptr;
    check(cuda.init(0), "the driver does not start");
    check(cuda.device_get(&handle, device), "no such device");
    // PyTorch works in the device's primary context.
    check(cuda.primary_context(&context_, handle), "the device has no context");
    CUcontext before = nullptr;
    check(cuda.get_current(&before), "no context");
    check(cuda.set_current(context_), "the context cannot be used");
    try {
        check(cuda.load(&module, code.data()), "a compiled kernel cannot be loaded");
        check(cuda.get_function(&function_, module, name.c_str()), "a compiled kernel is not in its module");
        constexpr int ALWAYS_ALLOWED = 48 * 1024;
        if (shared > ALWAYS_ALLOWED) {
            check(cuda.set_cache(function_, CU_FUNC_CACHE_PREFER_SHARED), "shared memory");
            check(cuda.set_attribute(function_, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared),
                  "the device has not as much shared memory");
        }
    } catch (...) {
        cuda.set_current(before);
        throw;
    }
    check(cuda.set_current(before), "the context cannot be used");
}

void CompiledKernel::launch(CUstream stream, const unsigned (&grid)[3], const std::vector<uint64_t>& values,
                            const std::vector<MappedTensor>& tensors) const {
    if (values.size() > letters_.size() || letters_.find_first_not_of('p', values.size()) != std::string::npos)
        throw std::invalid_argument("a launch gives all parameters but the last addresses");
    if (tensors.size() != tiles_.size()) throw std::invalid_argument("there is one tensor for each tensor map");
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) return;
    const Driver& cuda = driver();
    // A thread that has not called CUDA yet has no context.
    CUcontext current = nullptr;
    check(cuda.get_current(&current), "no context");
    if (!current) check(cuda.set_current(context_), "the context cannot be used");

    std::vector<CUtensorMap> maps;
    maps.reserve(tensors.size());
    uint64_t null = 0;
    std::vector<void*> parameters(letters_.size(), &null);
    for (size_t i = 0; i < values.size(); ++i) {
        parameters[i] = const_cast<uint64_t*>(&values[i]);
        if (letters_[i] != 'T') continue;
        maps.push_back(tensor_map(tiles_[maps.size()], tensors[maps.size()]));
        parameters[i] = &maps.back();
    }

    CUlaunchAttribute overlap{};
    overlap.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    overlap.value.programmaticStreamSerializationAllowed = 1;
    CUlaunchConfig config{};
    config.gridDimX = grid[0], config.gridDimY = grid[1], config.gridDimZ = grid[2];
    config.blockDimX = threads_, config.blockDimY = 1, config.blockDimZ = 1;
    config.sharedMemBytes = shared_;
    config.hStream = stream;
    config.attrs = &overlap;
    config.numAttrs = overlaps_ ? 1 : 0;
    check(cuda.launch(&config, function_, parameters.data(), nullptr), "a kernel cannot be launched");
}

}  // namespace fastldm
