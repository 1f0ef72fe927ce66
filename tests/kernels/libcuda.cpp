// A CUDA driver without a GPU: it accepts the calls of a launch and appends what it was given to the file
// $RECORDED_LAUNCHES, one JSON object a launch. $KERNEL_PARAMETERS tells it the sizes: "name 8 8 4;other 8".
#include <cuda.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <utility>

namespace {

thread_local CUcontext current = nullptr;

struct Function {
    std::string name, module;  // the module in hexadecimal digits
    int limit = 48 * 1024;     // of dynamic shared memory
};

std::string hexadecimal(const void* data, size_t size) {
    std::string text;
    char digits[3];
    for (size_t i = 0; i < size; ++i) {
        std::snprintf(digits, sizeof digits, "%02x", static_cast<const unsigned char*>(data)[i]);
        text += digits;
    }
    return text;
}

// An ELF file ends with its section headers.
size_t size_of(const unsigned char* elf) {
    uint64_t sections;
    uint16_t size, count;
    std::memcpy(&sections, elf + 0x28, sizeof sections);
    std::memcpy(&size, elf + 0x3a, sizeof size);
    std::memcpy(&count, elf + 0x3c, sizeof count);
    uint64_t programs;
    uint16_t program_size, program_count;
    std::memcpy(&programs, elf + 0x20, sizeof programs);
    std::memcpy(&program_size, elf + 0x36, sizeof program_size);
    std::memcpy(&program_count, elf + 0x38, sizeof program_count);
    const uint64_t ends[] = {sections + uint64_t(size) * count, programs + uint64_t(program_size) * program_count};
    return ends[0] > ends[1] ? ends[0] : ends[1];
}

std::string parameters(const std::string& name, void** given) {
    std::istringstream all(std::getenv("KERNEL_PARAMETERS"));
    std::string text;
    for (std::string one; std::getline(all, one, ';');) {
        std::istringstream words(one);
        std::string whose;
        words >> whose;
        if (whose != name) continue;
        size_t index = 0;
        for (size_t size; words >> size; ++index)
            text += (index ? ", \"" : "\"") + hexadecimal(given[index], size) + "\"";
    }
    return text;
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute, CUdevice) { return *value = 232448, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char** text) { return *text = "refused by the double", CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t*, CUlimit) { return CUDA_ERROR_UNKNOWN; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_ERROR_UNKNOWN; }
CUresult cuOccupancyMaxActiveClusters(int*, CUfunction, const CUlaunchConfig*) { return CUDA_ERROR_UNKNOWN; }

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    return *context = reinterpret_cast<CUcontext>(uintptr_t(0xc0 + device)), CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr pointer) {
    std::memcpy(value, &pointer, sizeof pointer);
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    if (std::memcmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
    auto* text = new std::string(hexadecimal(image, size_of(static_cast<const unsigned char*>(image))));
    return *module = reinterpret_cast<CUmodule>(text), CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    auto* made = new Function{name, *reinterpret_cast<std::string*>(module)};
    return *function = reinterpret_cast<CUfunction>(made), CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
    return *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    if (which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        if (value > 232448) return CUDA_ERROR_INVALID_VALUE;
        reinterpret_cast<Function*>(function)->limit = value;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

// The map says all that it was made of.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    unsigned char bytes[sizeof *map] = {};
    size_t end = 0;
    const auto add = [&](const void* from, size_t size) { std::memcpy(bytes + end, from, size), end += size; };
    if (rank != 2) return CUDA_ERROR_INVALID_VALUE;
    const cuuint32_t numbers[] = {type, rank, interleave, swizzle, promotion, fill};
    add(numbers, sizeof numbers);
    add(&address, sizeof address);
    add(sizes, rank * sizeof *sizes);
    add(strides, (rank - 1) * sizeof *strides);
    add(box, rank * sizeof *box);
    add(steps, rank * sizeof *steps);
    std::memcpy(map, bytes, sizeof bytes);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* launch, CUfunction handle, void** given, void** extra) {
    const auto& function = *reinterpret_cast<Function*>(handle);
    if (!current || extra) return CUDA_ERROR_INVALID_CONTEXT;
    if (launch->sharedMemBytes > unsigned(function.limit)) return CUDA_ERROR_INVALID_VALUE;
    std::ostringstream line;
    line << "{\"name\": \"" << function.name << "\", \"grid\": [" << launch->gridDimX << ", " << launch->gridDimY
         << ", " << launch->gridDimZ << "], \"block\": [" << launch->blockDimX << ", " << launch->blockDimY << ", "
         << launch->blockDimZ << "], \"shared\": " << launch->sharedMemBytes
         << ", \"stream\": " << reinterpret_cast<uintptr_t>(launch->hStream) << ", \"attributes\": [";
    for (unsigned i = 0; i < launch->numAttrs; ++i)
        line << (i ? ", [" : "[") << launch->attrs[i].id << ", "
             << launch->attrs[i].value.programmaticStreamSerializationAllowed << "]";
    line << "], \"parameters\": [" << parameters(function.name, given) << "], \"module\": \"" << function.module
         << "\"}\n";
    std::FILE* file = std::fopen(std::getenv("RECORDED_LAUNCHES"), "a");
    std::fputs(line.str().c_str(), file);
    std::fclose(file);
    return CUDA_SUCCESS;
}

}  // extern "C"
