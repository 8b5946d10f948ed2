// Has any of these tensors moved? Asked before every launch, of every tensor of a plan. Included by module.cpp alone: this
// is the one place that looks at Python objects.
//
// Torch itself says what a tensor is, through the C functions of its ABI-stable interface (aoti_torch_get_…), whose
// addresses Python has found in libtorch. They take a pointer to an at::Tensor, which holds nothing but the pointer that
// Python knows as `tensor._cdata`. Python tries this out before it relies on it (fiun_fast/memory.py).
#pragma once

#include <pybind11/pybind11.h>

#include <stdint.h>

#include <vector>

namespace fiun {

namespace py = pybind11;

// Whether each object is still what its mapping holds under its key.
inline bool all_held(const py::list& mappings, const py::list& keys, const py::list& objects) {
    const Py_ssize_t n = PyList_GET_SIZE(objects.ptr());
    if (PyList_GET_SIZE(mappings.ptr()) != n || PyList_GET_SIZE(keys.ptr()) != n) return false;
    for (Py_ssize_t i = 0; i < n; ++i) {
        PyObject* const mapping = PyList_GET_ITEM(mappings.ptr(), i);
        PyObject* const key = PyList_GET_ITEM(keys.ptr(), i);
        PyObject* held;
        if (PyDict_Check(mapping)) {
            held = PyDict_GetItemWithError(mapping, key);  // borrowed, and never looked into
            if (!held && PyErr_Occurred()) throw py::error_already_set();
        } else {  // `get`, not an index: that could make an entry
            held = PyObject_CallMethod(mapping, "get", "O", key);
            if (!held) throw py::error_already_set();
            Py_DECREF(held);  // only its identity matters
        }
        if (held != PyList_GET_ITEM(objects.ptr(), i)) return false;
    }
    return true;
}

class Places {
  public:
    // Addresses of aoti_torch_get_ data_ptr, storage_size, dtype, device_type, device_index, dim, sizes, strides and
    // storage_offset.
    explicit Places(const std::vector<int64_t>& functions) {
        if (functions.size() != 9) throw std::invalid_argument("expected the addresses of 9 functions");
        data_ = reinterpret_cast<Get<void*>>(functions[0]);
        held_ = reinterpret_cast<Get<int64_t>>(functions[1]);
        for (int i = 0; i < 3; ++i) kinds_[i] = reinterpret_cast<Get<int32_t>>(functions[2 + i]);
        dim_ = reinterpret_cast<Get<int64_t>>(functions[5]);
        for (int i = 0; i < 2; ++i) extents_[i] = reinterpret_cast<Get<int64_t*>>(functions[6 + i]);
        offset_ = reinterpret_cast<Get<int64_t>>(functions[8]);
    }

    // Whether each tensor is contiguous and of the first one's dtype, of so many bytes an element, and its storage reaches
    // to its end. The tensors are plain: Python has looked at their types and dispatch keys.
    bool fit(const py::list& tensors, int64_t element) const {
        std::vector<int64_t> now;
        int64_t dtype = -1;
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors.ptr()); ++i) {
            now.clear();
            int64_t offset = 0;
            if (!describe(impl(PyList_GET_ITEM(tensors.ptr(), i)), now, &offset)) return false;
            if (i == 0) dtype = now[2];
            const int64_t held = now[1], dim = now[5];
            const int64_t *const sizes = now.data() + 6, *const strides = sizes + dim;
            int64_t numel = 1;
            bool contiguous = true;
            for (int64_t d = dim; d-- > 0;) {
                contiguous &= sizes[d] == 1 || strides[d] == numel;
                numel *= sizes[d];
            }
            if (now[2] != dtype || (numel > 0 && (!contiguous || (offset + numel) * element > held))) return false;
        }
        return true;
    }

    // Record how each tensor lies: address, bytes of its storage, dtype, device, sizes, strides.
    void take(const py::list& tensors) {
        places_.clear();
        impls_.clear();
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors.ptr()); ++i) {
            impls_.push_back(impl(PyList_GET_ITEM(tensors.ptr(), i)));
            if (!describe(impls_.back(), places_)) throw std::runtime_error("torch refused");
        }
    }

    // Whether each tensor still lies as it was recorded.
    bool unchanged(const py::list& tensors) const {
        const int64_t* before = places_.data();
        const int64_t* const end = before + places_.size();
        std::vector<int64_t> now;
        const Py_ssize_t n = PyList_GET_SIZE(tensors.ptr());
        if (size_t(n) != impls_.size()) return false;
        for (Py_ssize_t i = 0; i < n; ++i) {
            if (i + ahead < n) {  // where it was is where it will be, most likely; asking elsewhere does no harm
                expect(PyList_GET_ITEM(tensors.ptr(), i + ahead), 1);
                expect(impls_[size_t(i + ahead)], 4);
            }
            now.clear();
            if (!describe(impl(PyList_GET_ITEM(tensors.ptr(), i)), now)) return false;
            if (end - before < int64_t(now.size())) return false;
            for (const int64_t number : now) {
                if (number != *before++) return false;
            }
        }
        return before == end;
    }

    // The same numbers for one tensor, so that Python can try this out.
    std::vector<int64_t> of(const py::object& tensor) const {
        std::vector<int64_t> place;
        if (!describe(impl(tensor.ptr()), place)) throw std::runtime_error("torch refused");
        return place;
    }

  private:
    template <class T>
    using Get = int32_t (*)(void* tensor, T* value);  // 0: success

    static constexpr Py_ssize_t ahead = 16;  // tensors whose memory is on its way, since each is a chain of cache misses

    static void expect(const void* address, int lines) {
#if defined(__GNUC__)
        for (int i = 0; i < lines; ++i) __builtin_prefetch(static_cast<const char*>(address) + 64 * i);
#else
        (void)address, (void)lines;
#endif
    }

    // What the Python object refers to now; tensors can be swapped.
    void* impl(PyObject* tensor) const {
        PyObject* const number = PyObject_GetAttr(tensor, cdata_.ptr());
        if (!number) throw py::error_already_set();
        void* const address = PyLong_AsVoidPtr(number);
        Py_DECREF(number);
        return address;
    }

    // Appends address, bytes, dtype, device type, device index, dim, sizes, strides.
    bool describe(void* impl, std::vector<int64_t>& place, int64_t* offset = nullptr) const {
        if (!impl) return false;
        void* const handle = &impl;
        void* data = nullptr;
        int64_t held = 0, dim = 0;
        int32_t kinds[3] = {0, 0, 0};
        int64_t* extents[2] = {nullptr, nullptr};
        if (data_(handle, &data) || held_(handle, &held) || dim_(handle, &dim)) return false;
        if (offset && offset_(handle, offset)) return false;
        place.push_back(reinterpret_cast<int64_t>(data));
        place.push_back(held);
        for (int i = 0; i < 3; ++i) {
            if (kinds_[i](handle, kinds + i)) return false;
            place.push_back(kinds[i]);
        }
        place.push_back(dim);
        for (int i = 0; i < 2; ++i) {
            if (extents_[i](handle, extents + i)) return false;
            place.insert(place.end(), extents[i], extents[i] + dim);
        }
        return true;
    }

    Get<void*> data_;
    Get<int64_t> held_, dim_, offset_;
    Get<int32_t> kinds_[3];
    Get<int64_t*> extents_[2];
    std::vector<int64_t> places_;
    std::vector<void*> impls_;
    py::str cdata_{"_cdata"};
};

}  // namespace fiun
