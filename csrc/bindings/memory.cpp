#include "bindings.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace fastldm {
namespace {

// A wish: where the system does not grant it, nothing changes.
void prefer_huge_pages(Address address, int64_t bytes) {
    require(bytes >= 0, "bytes are not negative");
#ifdef __linux__
    constexpr Address PAGE = 4096;
    const Address first = (address + PAGE - 1) / PAGE * PAGE,
                  last = (address + static_cast<Address>(bytes)) / PAGE * PAGE;
    if (first < last) madvise(pointer<void>(first), last - first, MADV_HUGEPAGE);
#else
    (void)address;
#endif
}

}  // namespace

void bind_memory(py::module_& module) {
    module.def("prefer_huge_pages", &prefer_huge_pages, py::arg("address"), py::arg("bytes"),
               "Asks the system to back this memory with huge pages when it is first written.");
}

}  // namespace fastldm
