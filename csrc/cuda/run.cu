#include "run.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace fiun {
namespace {

constexpr int most_tile_steps = 8;  // long enough that finding the tile costs nothing, short enough to share out evenly

void check(cudaError_t error, const char* call) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // so that the next call does not report this one again
    throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error));
}

// Makes a device the current one of this thread, and the former one again at the end.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        changed_ = device != before_;
        if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

cudaStream_t stream_of(int64_t address) { return reinterpret_cast<cudaStream_t>(address); }

// Blocks of a kernel that run at once on the current device; found out once.
template <class Args>
int resident_blocks(int device, void (*kernel)(Args)) {
    static std::mutex guard;
    static std::map<std::pair<int, void (*)(Args)>, int> known;
    const std::lock_guard<std::mutex> lock(guard);
    int& blocks = known[{device, kernel}];
    if (blocks == 0) {
        int processors = 0, each = 0;
        check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, block_threads, 0),
              "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
        blocks = processors * std::max(each, 1);
    }
    return blocks;
}

template <class Args>
void launch(const char* name, void (*kernel)(Args), int device, int64_t tiles, const Args& args, int64_t stream) {
    const unsigned blocks = unsigned(std::min<int64_t>(tiles, resident_blocks(device, kernel)));
    void* list[] = {const_cast<Args*>(&args)};
    check(cudaLaunchKernel(kernel, dim3(blocks), dim3(block_threads), list, 0, stream_of(stream)), name);
}

struct Stream {  // one of the sequences of elements that a kernel goes through in step
    int64_t address, bytes;
};

bool aligned_at(const std::vector<Stream>& streams, int64_t element, int unit) {
    return std::all_of(streams.begin(), streams.end(), [&](const Stream& s) {
        return (s.address + element * s.bytes) % std::min<int64_t>(16, unit * s.bytes) == 0;
    });
}

// Appends the spans of `length` elements: what lies before the first element where all addresses suit 16-byte accesses,
// whole units from there, and the rest; or one scalar span if there is no such element, or too little after it.
void append_spans(std::vector<Span>& spans, const std::vector<Stream>& streams, int64_t length, TileShape shape) {
    int64_t head = 0;
    while (head < shape.unit && !aligned_at(streams, head, shape.unit)) ++head;
    const int64_t body = (length - head) / shape.unit * shape.unit;
    if (head == shape.unit || body < shape.unit || (length <= shape.step && body < length)) {
        if (length > 0) spans.push_back({0, length, 0, false});
        return;
    }
    if (head > 0) spans.push_back({0, head, 0, false});
    spans.push_back({head, body, 0, true});
    if (head + body < length) spans.push_back({head + body, length - head - body, 0, false});
}

// Numbers the tiles of these spans; they are as long as they can be while each of `warps` has something to do.
template <int most>
void number_tiles(Walk<most>& walk, const Span* spans, int count, int step, int64_t warps) {
    int64_t steps = 0;
    for (int s = 0; s < count; ++s) steps += (spans[s].length + step - 1) / step;
    walk.tile_elements = step * int(std::clamp<int64_t>(steps / warps, 1, most_tile_steps));
    int64_t tiles = 0;
    for (int s = 0; s < count; ++s) {
        walk.spans[s] = spans[s];
        walk.spans[s].first_tile = tiles;
        tiles += (spans[s].length + walk.tile_elements - 1) / walk.tile_elements;
    }
    walk.span_count = count;
    walk.tile_count = tiles;
}

DampenKernel dampen_kernel(int theta_kind, int fisher_kind, bool with_exponent, bool with_sign) {
    const auto of_f32 = with_sign ? dampen_signed_kernel_f32 : dampen_kernel_f32;
    const auto of_f64 = with_sign ? dampen_signed_kernel_f64 : dampen_kernel_f64;
    return (fisher_kind == f32 ? of_f32 : of_f64)(theta_kind, with_exponent);
}

HistogramKernel chosen_histogram(int theta_kind, int fisher_kind, bool with_sign) {
    return with_sign ? histogram_signed_kernel(theta_kind, fisher_kind) : histogram_kernel(fisher_kind);
}

}  // namespace

int toolkit_version() { return CUDART_VERSION; }

int driver_version() {
    int version = 0;
    check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
    return version;
}

std::vector<int> capabilities() {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    std::vector<int> found;
    for (int device = 0; device < count; ++device) {
        int major = 0, minor = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
        check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
        found.push_back(10 * major + minor);
    }
    return found;
}

TileShape tile_shape(int theta_kind, int fisher_kind) {
    const int narrow = int(std::min(kind_bytes[theta_kind], kind_bytes[fisher_kind]));
    const int wide = int(std::max(kind_bytes[theta_kind], kind_bytes[fisher_kind]));
    return {unit_elements(wide, narrow), lane_elements(wide) * warp_threads};
}

int resident_warps(int device, int theta_kind, int fisher_kind, bool with_exponent, bool with_sign) {
    const OnDevice on(device);
    return resident_blocks(device, dampen_kernel(theta_kind, fisher_kind, with_exponent, with_sign)) * block_warps;
}

void run_dampen(int device, int theta_kind, int fisher_kind, const DampenArgs& args, int64_t stream) {
    if (args.tile_count == 0) return;
    const OnDevice on(device);
    const DampenKernel kernel = dampen_kernel(theta_kind, fisher_kind, args.exponent != 1, args.gradients != nullptr);
    launch("launch of dampen", kernel, device, args.tile_count, args, stream);
}

int histogram_warps(int device, int theta_kind, int fisher_kind, bool with_sign) {
    const OnDevice on(device);
    return resident_blocks(device, chosen_histogram(theta_kind, fisher_kind, with_sign)) * block_warps;
}

void run_histogram(int device, int theta_kind, int fisher_kind, const HistogramArgs& args, int64_t stream) {
    if (args.run_count == 0) return;
    const OnDevice on(device);
    const HistogramKernel kernel = chosen_histogram(theta_kind, fisher_kind, args.gradients != nullptr);
    launch("launch of histogram", kernel, device, args.run_count, args, stream);
}

void run_merge(int device, int fisher_kind, const int64_t* sources, const double* weights, int64_t count, int merge,
               double scale, int64_t out, int64_t n, int64_t stream) {
    if (n == 0) return;
    const OnDevice on(device);
    const MergeKernel kernel = merge_kernel(fisher_kind);
    const TileShape shape = tile_shape(fisher_kind, fisher_kind);
    std::vector<Stream> streams{{out, kind_bytes[fisher_kind]}};
    for (int64_t k = 0; k < count; ++k) streams.push_back({sources[k], kind_bytes[fisher_kind]});
    std::vector<Span> spans;
    append_spans(spans, streams, n, shape);

    MergeArgs args{};
    args.out = out;
    args.merge = merge;
    args.scale = scale;
    args.total = count;
    number_tiles(args.walk, spans.data(), int(spans.size()), shape.step,
                 int64_t(resident_blocks(device, kernel)) * block_warps);
    for (int64_t done = 0; done < count;) {
        args.count = 0;
        if (done > 0) {  // what the previous launch has written is the first source of this one
            args.sources[0] = out;
            args.weights[args.count++] = 1;
        }
        while (args.count < merge_sources && done < count) {
            args.sources[args.count] = sources[done];
            args.weights[args.count++] = weights[done++];
        }
        args.finish = done == count;
        launch("launch of merge", kernel, device, args.walk.tile_count, args, stream);
    }
}

void run_accumulate(int device, const int64_t* pairs, int64_t pair_count, bool square, bool zero, int64_t stream) {
    const OnDevice on(device);
    for (int kinds = 0; kinds < theta_kinds * fisher_kinds; ++kinds) {
        const int gradient_kind = kinds / fisher_kinds, fisher_kind = kinds % fisher_kinds;
        const TileShape shape = tile_shape(gradient_kind, fisher_kind);
        std::vector<Span> spans;
        std::vector<const int64_t*> owners;  // the pair of each span
        for (const int64_t* pair = pairs; pair != pairs + 5 * pair_count; pair += 5) {
            if (pair[3] != gradient_kind || pair[4] != fisher_kind) continue;
            append_spans(spans, {{pair[0], kind_bytes[gradient_kind]}, {pair[1], kind_bytes[fisher_kind]}}, pair[2], shape);
            owners.resize(spans.size(), pair);
        }
        const AccumulateKernel kernel = accumulate_kernel(gradient_kind, fisher_kind);
        for (size_t first = 0; first < spans.size(); first += accumulate_spans) {
            const int count = int(std::min<size_t>(accumulate_spans, spans.size() - first));
            AccumulateArgs args{};
            for (int s = 0; s < count; ++s) {
                args.gradients[s] = owners[first + s][0];
                args.into[s] = owners[first + s][1];
            }
            number_tiles(args.walk, spans.data() + first, count, shape.step,
                         int64_t(resident_blocks(device, kernel)) * block_warps);
            args.square = square;
            args.zero = zero;
            launch("launch of accumulate", kernel, device, args.walk.tile_count, args, stream);
        }
    }
}

void run_add_squares(int device, int fisher_kind, int64_t into, int64_t products, int64_t rows, int64_t n, int64_t stream) {
    if (n == 0 || rows == 0) return;
    const OnDevice on(device);
    const SquaresKernel kernel = squares_kernel(fisher_kind);
    const TileShape shape = tile_shape(fisher_kind, fisher_kind);
    const int64_t bytes = kind_bytes[fisher_kind];
    std::vector<Stream> streams{{into, bytes}, {products, bytes}};
    if (rows > 1) streams.push_back({products + n * bytes, bytes});  // if the second row is aligned, all are
    std::vector<Span> spans;
    append_spans(spans, streams, n, shape);
    SquaresArgs args{into, products, rows, n, {}};
    number_tiles(args.walk, spans.data(), int(spans.size()), shape.step,
                 int64_t(resident_blocks(device, kernel)) * block_warps);
    launch("launch of add_squares", kernel, device, args.walk.tile_count, args, stream);
}

}  // namespace fiun
