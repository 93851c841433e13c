// Memory for large results, kept when they are freed. The C library gives blocks above 32 MB back to the system at
// once; the next one then costs a page fault for every 4 kB, which takes longer than filling it. Every function runs
// with the GIL held, results are freed with it held, so no lock is needed.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define BEV_MMAP 1
#endif

namespace py = pybind11;

namespace {

constexpr size_t kUnit = size_t(2) << 20;      // a large page
constexpr size_t kKeep = size_t(256) << 20;    // memory that lies idle at most

struct Block { void* address; size_t size; };

void* acquire(size_t size) {
#ifdef BEV_MMAP
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(p, size, MADV_HUGEPAGE);
#endif
    return p;
#else
    void* p = std::malloc(size);
    if (!p) throw std::bad_alloc();
    return p;
#endif
}

void give_up(Block b) {
#ifdef BEV_MMAP
    munmap(b.address, b.size);
#else
    std::free(b.address);
#endif
}

std::deque<Block>& idle() { static auto* blocks = new std::deque<Block>; return *blocks; }  // never destroyed: results may outlive us
size_t idle_bytes = 0;

void keep(Block b) {
    idle().push_back(b);
    idle_bytes += b.size;
    while (idle_bytes > kKeep) idle_bytes -= idle().front().size, give_up(idle().front()), idle().pop_front();  // the oldest first
}

py::array buffer(size_t bytes) {
    const size_t need = (bytes + kUnit - 1) / kUnit * kUnit;
    Block found{nullptr, 0};
    for (size_t i = idle().size(); i-- > 0;) {  // the newest first: it may still be in the caches
        const Block b = idle()[i];
        if (b.size < need || b.size > 2 * need) continue;
        found = b;
        idle_bytes -= b.size;
        idle().erase(idle().begin() + ptrdiff_t(i));
        break;
    }
    if (!found.address) found = {acquire(need), need};
    py::capsule owner(new Block(found), [](void* p) {
        auto* b = static_cast<Block*>(p);
        keep(*b);
        delete b;
    });
    return py::array(py::dtype::of<uint8_t>(), {py::ssize_t(bytes)}, {py::ssize_t(1)}, found.address, owner);
}

size_t release() {
    const size_t freed = idle_bytes;
    for (const Block& b : idle()) give_up(b);
    idle().clear();
    idle_bytes = 0;
    return freed;
}

}  // namespace

void bind_buffers(py::module_& m) {
    using namespace py::literals;
    m.def("buffer", &buffer, "Uninitialised bytes; their memory is kept for the next call when the array is freed", "bytes"_a);
    m.def("release_buffers", &release, "Give idle memory back to the system; return how many bytes it was");
}
