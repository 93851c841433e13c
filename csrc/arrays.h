// Checked views of NumPy arrays: every kernel states what it needs by name before it touches memory.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <type_traits>

namespace py = pybind11;

template <typename T> constexpr const char* dtype_name() {
    if constexpr (std::is_same_v<T, float>) return "float32";
    else if constexpr (std::is_same_v<T, double>) return "float64";
    else if constexpr (std::is_same_v<T, uint8_t>) return "uint8";
    else if constexpr (std::is_same_v<T, uint16_t>) return "uint16";
    else if constexpr (std::is_same_v<T, int32_t>) return "int32";
    else if constexpr (std::is_same_v<T, int64_t>) return "int64";
    else static_assert(sizeof(T) == 0, "name this type here");
}

inline void refuse(const std::string& what) { throw py::value_error("bev_reid._C: " + what); }

template <typename T> void check_dtype(const py::array& a, const char* name) {
    if (!py::isinstance<py::array_t<T>>(a))
        refuse(std::string(name) + " must be " + dtype_name<T>() + ", got " + std::string(py::str(a.dtype())));
}

// Address of a C-contiguous array of exactly `size` elements.
template <typename T> const T* input(const py::array& a, const char* name, int64_t size) {
    check_dtype<T>(a, name);
    if (!(a.flags() & py::array::c_style)) refuse(std::string(name) + " must be contiguous");
    if (a.size() != size)
        refuse(std::string(name) + " has " + std::to_string(a.size()) + " elements, expected " + std::to_string(size));
    return static_cast<const T*>(a.data());
}

template <typename T> T* output(py::array& a, const char* name, int64_t size) {
    input<T>(a, name, size);
    if (!a.writeable()) refuse(std::string(name) + " is read-only");
    return static_cast<T*>(a.mutable_data());
}
