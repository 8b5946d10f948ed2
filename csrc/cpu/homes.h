// Has any of these tensors moved? Asked before every launch, of every tensor of a plan. Included by module.cpp alone: this
// is the one place that looks at Python objects.
//
// Torch itself says what a tensor is, through the C functions of its ABI-stable interface (aoti_torch_get_…), whose
// addresses Python has found in libtorch. They take a pointer to an at::Tensor, which holds nothing but the pointer that
// Python knows as `tensor._cdata`. Python tries this out before it relies on it (fiun_fast/memory.py).
#pragma once

#include <pybind11/pybind11.h>

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <vector>

#include "pool.h"

namespace fiun {

namespace py = pybind11;

// Each of many objects is a chain of cache misses, so the memory of those to come is asked for before their turn. A hint:
// any address will do.
inline void expect(const void* address, int lines = 1) {
#if defined(__GNUC__)
    for (int i = 0; i < lines; ++i) __builtin_prefetch(static_cast<const char*>(address) + 64 * i);
#else
    (void)address, (void)lines;
#endif
}
constexpr Py_ssize_t before_turn = 12;  // objects between one step of a chain and the next

// Whether each object is still what its mapping holds under its key.
inline bool all_held(const py::list& mappings, const py::list& keys, const py::list& objects) {
    const Py_ssize_t n = PyList_GET_SIZE(objects.ptr());
    if (PyList_GET_SIZE(mappings.ptr()) != n || PyList_GET_SIZE(keys.ptr()) != n) return false;
    for (Py_ssize_t i = 0; i < n; ++i) {
        if (i + 2 * before_turn < n) expect(PyList_GET_ITEM(mappings.ptr(), i + 2 * before_turn));
        if (i + before_turn < n) {
            PyObject* const next = PyList_GET_ITEM(mappings.ptr(), i + before_turn);
            if (PyDict_Check(next)) expect(reinterpret_cast<PyDictObject*>(next)->ma_keys, 2);
        }
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

// The same question, asked again and again of the same mappings. CPython gives a dict a new number at each change, unique
// in the process (PEP 509; Python 3.10 to 3.13): where all numbers are what they were when every object was last found in
// its place, nothing has to be looked up. Only dicts have one; Python tries this out before it relies on it.
class Held {
  public:
    bool all(const py::list& mappings, const py::list& keys, const py::list& objects, int threads) {
        const size_t n = size_t(PyList_GET_SIZE(objects.ptr()));
        if (!dicts_.empty() && known_ == n && same(threads)) return true;
        dicts_.clear();
        if (!all_held(mappings, keys, objects)) return false;
        take(mappings, n);
        return true;
    }

    // The number of a dict; 0 where this Python has none.
    static uint64_t number(PyObject* mapping) {
#if PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED)
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
#endif
        return PyDict_Check(mapping) ? reinterpret_cast<PyDictObject*>(mapping)->ma_version_tag : 0;
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#else
        (void)mapping;
        return 0;
#endif
    }

  private:
    void take(const py::list& mappings, size_t n) {
        for (size_t i = 0; i < n; ++i) {
            PyObject* const mapping = PyList_GET_ITEM(mappings.ptr(), Py_ssize_t(i));
            if (number(mapping) == 0) return dicts_.clear();  // one of another kind: all are looked up
            dicts_.push_back(mapping);
        }
        std::sort(dicts_.begin(), dicts_.end());
        dicts_.erase(std::unique(dicts_.begin(), dicts_.end()), dicts_.end());
        numbers_.clear();
        for (PyObject* dict : dicts_) numbers_.push_back(number(dict));
        known_ = n;
    }

    // The threads only read; the caller holds the interpreter, and the list of mappings holds the dicts.
    bool same(int threads) const {
        constexpr int64_t chunk = 2048;
        const int64_t n = int64_t(dicts_.size());
        std::atomic<bool> same{true};
        auto check = [&](int64_t part, int) {
            const int64_t from = part * chunk, to = from + chunk < n ? from + chunk : n;
            bool here = true;
            for (int64_t i = from; i < to; ++i) {
                if (i + before_turn < to) expect(dicts_[size_t(i + before_turn)]);
                here &= number(dicts_[size_t(i)]) == numbers_[size_t(i)];
            }
            if (!here) same = false;
        };
        share_out((n + chunk - 1) / chunk, threads, check);
        return same;
    }

    std::vector<PyObject*> dicts_;  // each once; none: not known
    std::vector<uint64_t> numbers_;
    size_t known_ = 0;  // objects that were looked up when the numbers were taken
};

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
        starts_.clear();
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors.ptr()); ++i) {
            impls_.push_back(impl(PyList_GET_ITEM(tensors.ptr(), i)));
            starts_.push_back(places_.size());
            if (!describe(impls_.back(), places_)) throw std::runtime_error("torch refused");
        }
        field_ = field_of(tensors);
    }

    // Whether each tensor still lies as it was recorded. The threads only read; the caller holds the interpreter.
    bool unchanged(const py::list& tensors, int threads) const {
        constexpr int64_t chunk = 1024;
        const int64_t n = PyList_GET_SIZE(tensors.ptr());
        if (size_t(n) != impls_.size()) return false;
        if (field_ == 0) {
            for (int64_t i = 0; i < n; ++i) {
                if (impl(PyList_GET_ITEM(tensors.ptr(), i)) != impls_[size_t(i)]) return false;
            }
        }
        std::atomic<bool> same{true};
        auto check = [&](int64_t part, int) {
            const int64_t from = part * chunk, to = from + chunk < n ? from + chunk : n;
            if (same.load(std::memory_order_relaxed) && !same_places(tensors, from, to)) same = false;
        };
        share_out((n + chunk - 1) / chunk, threads, check);
        return same;
    }

    // Counts up the version of each tensor, which were recorded, by torch's C++ function of that address, (const Tensor&).
    void count_up(const py::list& tensors, int64_t function, int threads) const {
        constexpr int64_t chunk = 1024;
        const auto one_up = reinterpret_cast<void (*)(void* const& impl)>(function);
        const int64_t n = PyList_GET_SIZE(tensors.ptr());
        std::atomic<bool> refused{false};
        auto count = [&](int64_t part, int) {
            const int64_t from = part * chunk, to = from + chunk < n ? from + chunk : n;
            try {
                for (int64_t i = from; i < to; ++i) {
                    void* const impl = word(PyList_GET_ITEM(tensors.ptr(), i), field_);
                    one_up(impl);
                }
            } catch (...) {  // nothing may leave a thread
                refused = true;
            }
        };
        if (field_ != 0) {
            share_out((n + chunk - 1) / chunk, threads, count);
            if (refused) throw std::runtime_error("torch refused to count a version up");
            return;
        }
        for (int64_t i = 0; i < n; ++i) {
            void* const now = impl(PyList_GET_ITEM(tensors.ptr(), i));
            one_up(now);
        }
    }

    // Copies each tensor, of so many bytes an element, to where the recorded one at its place lies: contiguous memory in
    // the processor's reach, as theirs is. Nothing and false, unless all have the dtypes, devices, sizes and strides that
    // were recorded, and storages that reach to their ends. The tensors are plain, as for `fit`.
    bool copy_from(const py::list& tensors, int64_t element) const {
        struct Copy {
            void* to;
            const void* from;
            size_t bytes;
        };
        if (size_t(PyList_GET_SIZE(tensors.ptr())) != impls_.size()) return false;
        std::vector<Copy> copies;
        for (size_t i = 0; i < impls_.size(); ++i) {
            void* const now = impl(PyList_GET_ITEM(tensors.ptr(), Py_ssize_t(i)));
            void* const handle = const_cast<void**>(&now);
            const int64_t* const like = places_.data() + starts_[i];
            Place place;
            int64_t offset = 0, numel = 1;
            if (!look(now, place) || offset_(handle, &offset) || !shaped_as(place, like)) return false;
            for (int64_t d = 0; d < place.dim; ++d) numel *= place.sizes[d];
            if (numel > 0 && (offset + numel) * element > place.held) return false;
            copies.push_back({reinterpret_cast<void*>(like[0]), place.data, size_t(numel * element)});
        }
        for (const Copy& copy : copies) {
            if (copy.bytes > 0) memcpy(copy.to, copy.from, copy.bytes);
        }
        return true;
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

    // What the Python object refers to now; tensors can be swapped.
    void* impl(PyObject* tensor) const {
        PyObject* const number = PyObject_GetAttr(tensor, cdata_.ptr());
        if (!number) throw py::error_already_set();
        void* const address = PyLong_AsVoidPtr(number);
        Py_DECREF(number);
        return address;
    }

    // The word of a tensor's Python object that `_cdata` is read from, or 0 where not all of these have it at one place.
    size_t field_of(const py::list& tensors) const {
        const Py_ssize_t n = PyList_GET_SIZE(tensors.ptr());
        for (size_t at = sizeof(PyObject); n > 0; at += sizeof(void*)) {
            bool all = true;
            for (Py_ssize_t i = 0; i < n && all; ++i) {
                PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), i);
                if (size_t(Py_TYPE(tensor)->tp_basicsize) < at + sizeof(void*)) return 0;
                all = word(tensor, at) == impls_[size_t(i)];
            }
            if (all) return at;
        }
        return 0;
    }

    static void* word(const void* object, size_t at) {
        void* found;
        memcpy(&found, static_cast<const char*>(object) + at, sizeof(found));
        return found;
    }

    bool same_places(const py::list& tensors, int64_t from, int64_t to) const {
        for (int64_t i = from - 2 * before_turn; i < to; ++i) {
            const int64_t later = i + 2 * before_turn, next = i + before_turn;
            if (later < to) {
                expect(static_cast<char*>(static_cast<void*>(PyList_GET_ITEM(tensors.ptr(), later))) + field_);
                expect(impls_[size_t(later)], 4);
            }
            if (next >= from && next < to) {
                void* const impl = impls_[size_t(next)];
                if (field_ != 0 && word(PyList_GET_ITEM(tensors.ptr(), next), field_) != impl) return false;
                // its storage, and its version counter, which is counted up next: where they are in torch 2.x
                expect(word(impl, 2 * sizeof(void*)), 2);
                expect(word(impl, 5 * sizeof(void*)));
            }
            if (i >= from && !lies_as(impls_[size_t(i)], places_.data() + starts_[size_t(i)])) return false;
        }
        return true;
    }

    struct Place {
        void* data = nullptr;
        int64_t held = 0, dim = 0, *sizes = nullptr, *strides = nullptr;
        int32_t kinds[3] = {0, 0, 0};
    };

    bool look(void* impl, Place& place) const {
        if (!impl) return false;
        void* const handle = &impl;
        return !(data_(handle, &place.data) || held_(handle, &place.held) || dim_(handle, &place.dim) ||
                 kinds_[0](handle, place.kinds) || kinds_[1](handle, place.kinds + 1) ||
                 kinds_[2](handle, place.kinds + 2) || extents_[0](handle, &place.sizes) ||
                 extents_[1](handle, &place.strides));
    }

    bool lies_as(void* impl, const int64_t* before) const {
        Place now;
        if (!look(impl, now) || before[0] != reinterpret_cast<int64_t>(now.data) || before[1] != now.held) return false;
        return shaped_as(now, before);
    }

    static bool shaped_as(const Place& now, const int64_t* before) {
        for (int i = 0; i < 3; ++i) {
            if (before[2 + i] != now.kinds[i]) return false;
        }
        if (before[5] != now.dim) return false;
        for (int64_t d = 0; d < now.dim; ++d) {
            if (before[6 + d] != now.sizes[d] || before[6 + now.dim + d] != now.strides[d]) return false;
        }
        return true;
    }

    // Appends address, bytes, dtype, device type, device index, dim, sizes, strides.
    bool describe(void* impl, std::vector<int64_t>& place, int64_t* offset = nullptr) const {
        Place now;
        void* const handle = &impl;
        if (!look(impl, now) || (offset && offset_(handle, offset))) return false;
        place.insert(place.end(), {reinterpret_cast<int64_t>(now.data), now.held});
        place.insert(place.end(), now.kinds, now.kinds + 3);
        place.push_back(now.dim);
        place.insert(place.end(), now.sizes, now.sizes + now.dim);
        place.insert(place.end(), now.strides, now.strides + now.dim);
        return true;
    }

    Get<void*> data_;
    Get<int64_t> held_, dim_, offset_;
    Get<int32_t> kinds_[3];
    Get<int64_t*> extents_[2];
    std::vector<int64_t> places_;
    std::vector<size_t> starts_;  // of each tensor in places_
    std::vector<void*> impls_;
    size_t field_ = 0;  // where the Python object has the pointer; 0: not known
    py::str cdata_{"_cdata"};
};

}  // namespace fiun
