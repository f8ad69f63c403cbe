// Convolutions for inference on CPUs, called by XLA: y = act(conv(x) + bias + residual).
//
// What stands between a pointwise and a depthwise step never leaves the cache: rows of it go
// through a ring buffer. Arrays are channels last, float32. Weights come packed, see kernels.py; if
// they come in bfloat16, products are of rounded numbers, by tiles (AMX), and sums are float32.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define FALCON_TILES 1
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kLanes = 16;
constexpr int64_t kFirstCache = 10 * 1024;  // floats: most of one of 48 kB
constexpr int kPanel = 64;  // columns of packed weights that lie together
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));

#if defined(__AVX512F__)
constexpr int kMaxVecs = 4;  // columns of a register tile, in vectors
constexpr int TileRows(int vecs) { return vecs == 4 ? 6 : vecs == 3 ? 8 : 12; }
#else
constexpr int kMaxVecs = 1;
constexpr int TileRows(int) { return 6; }
#endif

// In loops that keep sums in registers a call would store them all.
#define FALCON_INLINE inline __attribute__((always_inline))

FALCON_INLINE Vec Load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
FALCON_INLINE void Store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
FALCON_INLINE Vec LoadSome(const float* p, int n) {
  if (n >= kLanes) return Load(p);
  Vec v = {};
  std::memcpy(&v, p, sizeof(float) * n);
  return v;
}
FALCON_INLINE void StoreSome(float* p, Vec v, int n) {
  if (n >= kLanes) {
    Store(p, v);
  } else {
    std::memcpy(p, &v, sizeof(float) * n);
  }
}
FALCON_INLINE Vec Relu(Vec v) {
  Vec zero = {};
  return v < zero ? zero : v;  // NaN stays
}

// Where the sums of a product's rows go: `spacing` floats from one 16 columns to the next.
struct Target {
  int64_t spacing;
  const float* bias = nullptr;  // what the sums start from, or null
  bool relu = false;
};

// to[i][spacing v ...] = sum over segments s and k of rows[s * MR + i][k] * b[s * depth + k][16 v ...]
// A function of its own, so that the sums stay in registers whatever is done with them. A panel that
// is larger than the first cache is asked for ahead of its use.
template <int MR, int NV, bool kAhead>
__attribute__((noinline)) void Multiply(const float* const* rows, int segments, int64_t depth,
                                        const float* b, int64_t stride, float* const* to,
                                        const Target& target) {
  Vec acc[MR][NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const Vec start = target.bias ? Load(target.bias + kLanes * v) : Vec{};
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) acc[i][v] = start;
  }
  for (int s = 0; s < segments; ++s) {
    const float* a[MR];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) a[i] = rows[s * MR + i];
    for (int64_t k = 0; k < depth; ++k) {
      Vec column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        column[v] = Load(b + kLanes * v);
        if constexpr (kAhead) __builtin_prefetch(b + 8 * stride + kLanes * v);
      }
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const float x = a[i][k];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] += x * column[v];
      }
      b += stride;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      Store(to[i] + v * target.spacing, target.relu ? Relu(acc[i][v]) : acc[i][v]);
}

struct Shape {
  int64_t batch, height, width, in;           // of the input
  int64_t out_height, out_width, out;         // of the output
  int64_t terms;                              // rank k
  int64_t rows, cols;                         // taps
  int64_t stride_h, stride_w, dilation_h, dilation_w;
  int64_t top, left;                          // zeros before the first row and column
  bool pool;                                  // 2x2 maxima of the output are stored
  int64_t padded_width() const { return (out_width - 1) * stride_w + (cols - 1) * dilation_w + 1; }
  int64_t padded_out() const { return (out + kLanes - 1) / kLanes * kLanes; }
};

inline int PanelWidth(const Shape& s, int64_t panel) {
  return static_cast<int>(std::min<int64_t>(kPanel, s.padded_out() - panel * kPanel));
}

// What is added to an output and where it is stored.
struct Epilogue {
  const float* bias;      // padded_out entries
  const float* residual;  // as the output, or null
  float* y;
  bool relu;
  int64_t out;

  FALCON_INLINE Vec Finish(int64_t pixel, int64_t channel, Vec v) const {
    v += Load(bias + channel);
    if (residual)
      v += LoadSome(residual + pixel * out + channel, static_cast<int>(out - channel));
    return relu ? Relu(v) : v;
  }
  FALCON_INLINE void Put(int64_t pixel, int64_t channel, Vec v) const {
    const int n = static_cast<int>(out - channel);
    if (n > 0) StoreSome(y + pixel * out + channel, Finish(pixel, channel, v), n);
  }
};

// The same for one row that is pooled with the next: it goes to a buffer.
struct PooledEpilogue {
  const Epilogue& whole;
  float* row;  // columns of one pixel side by side
  int64_t columns, channel0, pixel0;

  FALCON_INLINE void Put(int64_t pixel, int64_t channel, Vec v) const {
    if (channel < whole.out)
      Store(row + (pixel - pixel0) * columns + channel - channel0,
            whole.Finish(pixel, channel, v));
  }
};

// Rows [0, count) of a product with NV * 16 columns. `point(s, i)` gives where the depth entries
// of row i for segment s stand. The sums go to `place(i)` if the target has a spacing; if it is 0,
// `sink(i, vectors)` takes the NV results of a row.
template <int NV, class Point, class Place, class Sink>
inline void Product(int64_t count, int segments, int64_t depth, const float* b, int64_t stride,
                    const Target& target, Point&& point, Place&& place, Sink&& sink) {
  constexpr int MR = TileRows(NV);
  std::vector<const float*> rows(static_cast<size_t>(segments) * MR);
  alignas(64) float tile[MR * NV * kLanes];
  const bool direct = target.spacing > 0;
  const Target used = direct ? target : Target{kLanes};
  const bool ahead = segments * depth * NV * kLanes > kFirstCache;
  int64_t i = 0;
  auto some = [&](auto size) {
    constexpr int R = decltype(size)::value;
    if constexpr (R <= MR) {
      for (; i + R <= count; i += R) {
        for (int s = 0; s < segments; ++s)
          for (int r = 0; r < R; ++r) rows[s * R + r] = point(s, i + r);
        auto* multiply = ahead ? Multiply<R, NV, true> : Multiply<R, NV, false>;
        float* to[R];
        for (int r = 0; r < R; ++r) to[r] = direct ? place(i + r) : tile + r * NV * kLanes;
        multiply(rows.data(), segments, depth, b, stride, to, used);
        for (int r = 0; r < R && !direct; ++r) sink(i + r, to[r]);
      }
    }
  };
  some(std::integral_constant<int, MR>{});
  some(std::integral_constant<int, 8>{});
  some(std::integral_constant<int, 4>{});
  some(std::integral_constant<int, 2>{});
  some(std::integral_constant<int, 1>{});
}

// The same for a panel of some width: `place(i, column, vectors)`, `sink(i, column, vectors, values)`.
template <class Point, class Place, class Sink>
inline void PanelProduct(int width, int64_t count, int segments, int64_t depth, const float* b,
                         const Target& target, Point&& point, Place&& place, Sink&& sink) {
  int done = 0;
  auto part = [&](auto vecs) {
    constexpr int NV = decltype(vecs)::value;
    for (; width - done >= NV * kLanes; done += NV * kLanes) {
      Target there = target;
      if (there.bias) there.bias += done;
      Product<NV>(
          count, segments, depth, b + done, width, there, point,
          [&](int64_t i) { return place(i, done, NV); },
          [&](int64_t i, const float* values) { sink(i, done, NV, values); });
    }
  };
  if constexpr (kMaxVecs == 4) {
    part(std::integral_constant<int, 4>{});
    part(std::integral_constant<int, 3>{});
    part(std::integral_constant<int, 2>{});
  }
  part(std::integral_constant<int, 1>{});
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kTileDepth = 32;  // bfloat16 entries of a tile's row

inline int64_t TiledDepth(int64_t depth) { return CeilDiv(depth, kTileDepth) * kTileDepth; }
// Entries between rounded rows: tiles of them then lie in different sets of the cache.
inline int64_t TiledStride(int64_t depth) { return TiledDepth(depth) + kTileDepth; }

#if defined(FALCON_TILES)

// Whether the system lets this process have tiles; it has to be asked.
bool HasTiles() {
  constexpr int kAsk = 0x1023, kTileData = 18;
  static const bool given = syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
  return given;
}

// Tiles of 16 rows of 64 bytes, for the thread and the time that this lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } sizes;
    _tile_loadconfig(&sizes);
  }
  ~Tiles() { _tile_release(); }
};

// Row i becomes the entries of all its segments, rounded; zeros follow up to a multiple of 32.
template <class Point>
void RoundRows(int64_t count, int segments, int64_t depth, Point&& point, uint16_t* to) {
  const int64_t stride = TiledStride(segments * depth), whole = TiledDepth(segments * depth);
  for (int64_t i = 0; i < count; ++i, to += stride) {
    for (int64_t k = segments * depth / kLanes * kLanes; k < whole; ++k) to[k] = 0;
    for (int s = 0; s < segments; ++s) {
      const float* from = point(s, i);
      uint16_t* row = to + s * depth;
      for (int64_t k = 0; k < depth; k += kLanes) {
        const __mmask16 real = depth - k >= kLanes ? 0xffff : (1u << (depth - k)) - 1;
        const __m256bh some = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(real, from + k));
        _mm256_mask_storeu_epi16(row + k, real, reinterpret_cast<const __m256i&>(some));
      }
    }
  }
}

// 16 R rows of a product with 16 C columns; those of `out` lie together.
template <int R, int C>
void MultiplyTiles(const uint16_t* a, int64_t stride, int64_t depth, const uint16_t* b,
                   float* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    _tile_loadd(4, a + k, stride * 2);
    _tile_loadd(6, b + k * kLanes, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 2) {
      _tile_loadd(7, b + (depth + k) * kLanes, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, a + 16 * stride + k, stride * 2);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (C == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int kBytes = 64 * C;
  _tile_stored(0, out, kBytes);
  if constexpr (C == 2) _tile_stored(1, out + kLanes, kBytes);
  if constexpr (R == 2) _tile_stored(2, out + 16 * kLanes * C, kBytes);
  if constexpr (R == 2 && C == 2) _tile_stored(3, out + 16 * kLanes * C + kLanes, kBytes);
}

// `PanelProduct` of rounded rows.
template <class Sink>
void TiledPanelProduct(int width, int64_t count, int64_t depth, const uint16_t* rows,
                       const uint16_t* b, Sink&& sink) {
  const int64_t stride = TiledStride(depth), padded = TiledDepth(depth);
  alignas(64) float tile[32 * 32];
  for (int c = 0; c < width; c += 2 * kLanes, b += 2 * kLanes * padded) {
    const int vecs = width - c >= 2 * kLanes ? 2 : 1;
    for (int64_t i = 0; i < count; i += 32) {
      const uint16_t* a = rows + i * stride;
      const bool two = count - i > 16;
      if (vecs == 2 && two) MultiplyTiles<2, 2>(a, stride, padded, b, tile);
      else if (vecs == 2) MultiplyTiles<1, 2>(a, stride, padded, b, tile);
      else if (two) MultiplyTiles<2, 1>(a, stride, padded, b, tile);
      else MultiplyTiles<1, 1>(a, stride, padded, b, tile);
      for (int64_t r = 0; r < std::min<int64_t>(count - i, 32); ++r)
        sink(i + r, c, vecs, tile + r * vecs * kLanes);
    }
  }
}

#else

bool HasTiles() { return false; }
struct Tiles {};
template <class Point>
void RoundRows(int64_t, int, int64_t, Point&&, uint16_t*) {}
template <class Sink>
void TiledPanelProduct(int, int64_t, int64_t, const uint16_t*, const uint16_t*, Sink&&) {}

#endif

// Weights of a product, of one type or the other.
struct Weights {
  const float* whole;       // or null
  const uint16_t* rounded;  // or null
  explicit operator bool() const { return whole || rounded; }
};

int64_t Threads(ffi::ThreadPool& pool) { return std::max<int64_t>(pool.num_threads(), 1); }

// Run tasks on the caller and on so many threads of the pool less one; returns when all are done.
void RunTasks(ffi::ThreadPool& pool, int64_t threads, int64_t tasks,
              std::function<void(int64_t)> body) {
  threads = std::min(threads, tasks);
  if (threads <= 1) {
    for (int64_t t = 0; t < tasks; ++t) body(t);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    int64_t tasks;
    std::function<void(int64_t)> body;
    void Work() {
      for (int64_t t; (t = next.fetch_add(1)) < tasks; done.fetch_add(1)) body(t);
    }
  };
  auto state = std::make_shared<State>();  // a helper that comes late finds nothing to do
  state->tasks = tasks;
  state->body = std::move(body);
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([state] { state->Work(); });
  state->Work();
  while (state->done.load() < tasks) std::this_thread::yield();
}

// XLA gives large outputs fresh memory in every call: with huge pages there are fewer faults.
void AskForHugePages(const float* y, int64_t floats) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(y), end = begin + floats * sizeof(float);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (last >= first + 2 * kPage)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Whether two output rows are computed together, which then share what they see: where there are
// several terms; with one, memory takes longer, and is read and written best in order.
inline bool TwoLines(const Shape& s) {
  return s.terms > 1 && s.rows == 3 && s.cols == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
         s.dilation_w == 1;
}

struct Plan {
  int64_t panels;  // a task's, of the output channels
  int64_t chunks;  // that the rows are cut into
  int64_t step;    // output rows between two products
};

constexpr int64_t kRingFloats = 160 * 1024;  // 640 kB a task
constexpr int64_t kStepPoints = 96;
constexpr int64_t kFewChannels = 16;
constexpr int64_t kPutTogether = 48 * 1024;  // floats that a task puts together
constexpr int64_t kSeenFloats = 256 * 1024;  // of the input, by a task: half of a cache of 2 MB
constexpr int64_t kMostRows = 480;
constexpr double kTilesFaster = 12;  // products by tiles than by vectors

Plan MakePlan(const Shape& s, int64_t threads, bool tiles) {
  const int64_t panels = CeilDiv(s.out, kPanel);
  const int64_t padded = s.padded_width();
  const int64_t halo = (s.rows - 1) * s.dilation_h + 1 - s.stride_h;
  const int64_t lines = TwoLines(s) ? 2 : 1;
  Plan best{1, 1, 1};
  double least = 1e300;
  for (int64_t g = panels; g >= 1; g = g == 1 ? 0 : CeilDiv(g, 2)) {
    for (int64_t chunks = 1; chunks <= std::min<int64_t>(s.out_height, 4 * threads); chunks *= 2) {
      const int64_t rows = CeilDiv(s.out_height, chunks);
      const int64_t in_rows = rows * s.stride_h + std::max<int64_t>(halo, 0);
      const int64_t step =
          std::min<int64_t>(rows, CeilDiv(kStepPoints, lines * s.stride_h * s.width) * lines);
      const int64_t columns = std::min(g * kPanel, s.padded_out());
      const int64_t ring =
          s.terms * ((step - 1) * s.stride_h + (s.rows - 1) * s.dilation_h + 1) * padded * columns;
      const double product = double(in_rows) * s.width *
                             (double(s.terms) * s.in * columns / kLanes /
                                  (tiles ? kTilesFaster : 1.0) +
                              s.in / 8.0);
      const double depthwise =
          double(rows) * s.out_width * columns / kLanes * (s.terms * s.rows * s.cols * 1.3 + 6);
      double cost = product + depthwise;
      if (ring > kRingFloats) cost *= 1.0 + 0.25 * double(ring) / kRingFloats;
      const int64_t tasks = s.batch * chunks * CeilDiv(panels, g);
      const double total = CeilDiv(tasks, threads) * (cost + 2000);
      if (total < least * 0.999) {
        least = total;
        best = {g, chunks, step};
      }
    }
  }
  return best;
}

// Depthwise step of LINES output rows, one below the other, from ring rows z[term][input row],
// columns [0, columns). Such a row has 16 channels of all its points, then the next 16.
template <int LINES, int KH, int KW, int STRIDE, class Out>
inline void DepthwiseRows(const Shape& s, const float* const* z, int64_t columns, int64_t channel0,
                          const float* depthwise, int64_t pixel0, const Out& epilogue) {
  static_assert(LINES == 1 || KH > 0);
  const int rows = KH ? KH : static_cast<int>(s.rows), cols = KW ? KW : static_cast<int>(s.cols);
  const int above = rows + LINES - 1;  // input rows
  const int64_t stride = STRIDE ? STRIDE : s.stride_w;
  const int64_t dilation = KW ? 1 : s.dilation_w;
  const int64_t padded_out = s.padded_out(), padded = s.padded_width();
  const int terms = static_cast<int>(s.terms);
  constexpr int kAtOnce = 4, kBlock = 16;
  // A few points and all their channels, so that the output is written in order.
  for (int64_t block = 0; block < s.out_width; block += kBlock)
  for (int64_t c = 0; c < columns; c += kLanes) {
    const float* weights = depthwise + channel0 + c;
    auto tap = [&](int r, int i, int j) {
      return Load(weights + ((int64_t(i) * cols + j) * terms + r) * padded_out);
    };
    const int64_t end = std::min(block + kBlock, s.out_width);
    int64_t w = block;
    for (; w + kAtOnce <= end; w += kAtOnce) {
      Vec acc[LINES][kAtOnce] = {};
      for (int r = 0; r < terms; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < above; ++i) {
          const float* row = z[r * above + i] + c * padded + w * stride * kLanes;
          if constexpr (KW > 0 && STRIDE > 0) {
            constexpr int kPoints = (kAtOnce - 1) * (STRIDE ? STRIDE : 1) + (KW ? KW : 1);
            Vec points[kPoints];
#pragma GCC unroll 16
            for (int p = 0; p < kPoints; ++p) points[p] = Load(row + p * kLanes);
#pragma GCC unroll 2
            for (int line = 0; line < LINES; ++line) {
              if (i < line || i - line >= KH) continue;
#pragma GCC unroll 8
              for (int j = 0; j < KW; ++j) {
                const Vec weight = tap(r, i - line, j);
#pragma GCC unroll 4
                for (int q = 0; q < kAtOnce; ++q) acc[line][q] += points[q * STRIDE + j] * weight;
              }
            }
          } else {
            for (int j = 0; j < cols; ++j) {
              const Vec weight = tap(r, i, j);
#pragma GCC unroll 4
              for (int q = 0; q < kAtOnce; ++q)
                acc[0][q] += Load(row + (q * stride + j * dilation) * kLanes) * weight;
            }
          }
        }
      }
#pragma GCC unroll 2
      for (int line = 0; line < LINES; ++line)
#pragma GCC unroll 4
        for (int q = 0; q < kAtOnce; ++q)
          epilogue.Put(pixel0 + line * s.out_width + w + q, channel0 + c, acc[line][q]);
    }
    for (; w < end; ++w)
      for (int line = 0; line < LINES; ++line) {
        Vec acc = {};
        for (int r = 0; r < terms; ++r)
          for (int i = 0; i < rows; ++i) {
            const float* row = z[r * above + line + i] + c * padded + w * stride * kLanes;
            for (int j = 0; j < cols; ++j) acc += Load(row + j * dilation * kLanes) * tap(r, i, j);
          }
        epilogue.Put(pixel0 + line * s.out_width + w, channel0 + c, acc);
      }
  }
}

template <class Out>
void AnyDepthwiseRows(const Shape& s, int lines, const float* const* z, int64_t columns,
                      int64_t channel0, const float* depthwise, int64_t pixel0, const Out& e) {
  const bool three = s.rows == 3 && s.cols == 3 && s.dilation_w == 1;
  if (lines == 2) {
    DepthwiseRows<2, 3, 3, 1>(s, z, columns, channel0, depthwise, pixel0, e);
  } else if (three && s.stride_w == 1) {
    DepthwiseRows<1, 3, 3, 1>(s, z, columns, channel0, depthwise, pixel0, e);
  } else if (three && s.stride_w == 2) {
    DepthwiseRows<1, 3, 3, 2>(s, z, columns, channel0, depthwise, pixel0, e);
  } else {
    DepthwiseRows<1, 0, 0, 0>(s, z, columns, channel0, depthwise, pixel0, e);
  }
}

template <int kWhich = 0>
float* Scratch(size_t floats) {
  thread_local std::vector<float> buffer;
  if (buffer.size() < floats + kLanes) buffer.resize(floats + kLanes);
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return buffer.data() + (64 - address % 64) % 64 / sizeof(float);
}

FALCON_INLINE Vec Max(Vec a, Vec b) {  // NaN if either is
  const Vec most = a < b ? b : a;
  return b == b ? most : b;
}

// Maxima of 2x2 points of two rows.
void StorePooledRow(const Shape& s, const float* pair, int64_t columns, int64_t channel0,
                    int64_t image, int64_t row, const Epilogue& e) {
  const float* next = pair + s.out_width * columns;
  float* y = e.y + (image * (s.out_height / 2) + row) * (s.out_width / 2) * e.out;
  for (int64_t w = 0; w < s.out_width / 2; ++w)
    for (int64_t c = 0; c < columns && channel0 + c < e.out; c += kLanes) {
      const int64_t at = 2 * w * columns + c;
      const Vec v = Max(Max(Load(pair + at), Load(pair + at + columns)),
                        Max(Load(next + at), Load(next + at + columns)));
      StoreSome(y + w * e.out + channel0 + c, v, static_cast<int>(e.out - channel0 - c));
    }
}

// One task: output rows [first, last) of one image and some panels of channels. Input rows of the
// depthwise step stand in a ring: products of x, or without weights x itself.
void PointwiseDepthwiseTask(const Shape& s, const Plan& plan, const float* x,
                            const Weights& weights, const float* depthwise, const float* inner, const Epilogue& whole,
                            int64_t image,
                            int64_t first, int64_t last, int64_t panel0, int64_t panels) {
  const int64_t channel0 = panel0 * kPanel;
  const int64_t columns = std::min(panels * kPanel, s.padded_out() - channel0);
  const int64_t padded = s.padded_width();
  const int64_t extent = (s.rows - 1) * s.dilation_h + 1;
  const int64_t ring = (plan.step - 1) * s.stride_h + extent;
  const int64_t row_floats = padded * columns;
  const int64_t pooled_floats = s.pool ? 2 * s.out_width * columns : 0;
  const int64_t rounded_floats =
      weights.rounded ? (ring * s.width + 32) * TiledStride(s.in) / 2 : 0;
  float* z = Scratch(s.terms * ring * row_floats + row_floats + pooled_floats + rounded_floats);
  float* zeros = z + s.terms * ring * row_floats;
  float* pair = zeros + row_floats;
  auto* rounded = reinterpret_cast<uint16_t*>(pair + pooled_floats);
  std::fill(zeros, zeros + row_floats, 0.0f);
  const int64_t begin = std::min(s.left, padded), end = std::min(s.left + s.width, padded);
  for (int64_t r = 0; r < s.terms * ring; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      float* row = z + r * row_floats + c * padded;
      std::fill(row, row + begin * kLanes, 0.0f);
      std::fill(row + std::max(end, begin) * kLanes, row + padded * kLanes, 0.0f);
    }
  }
  const int64_t used = std::max<int64_t>(end - begin, 0);
  const float* picture = x + image * s.height * s.width * s.in;
  const Epilogue& epilogue = whole;
  std::vector<const float*> taps(s.terms * (s.rows + 1));
  struct Place {
    int64_t row, at, offset;  // of an input point, and where its products go
  };
  std::vector<Place> places;
  int64_t ready = std::max<int64_t>(first * s.stride_h - s.top, 0);  // rows before are computed
  for (int64_t oh = first; oh < last; oh += plan.step) {
    const int64_t stop = std::min(oh + plan.step, last);
    const int64_t need = std::min((stop - 1) * s.stride_h - s.top + extent, s.height);
    ready = std::max(ready, std::max<int64_t>(oh * s.stride_h - s.top, 0));
    if (need > ready && used > 0) {
      const int64_t from = ready, count = (need - from) * used;
      places.resize(count);
      Place* next = places.data();
      for (int64_t row = from; row < need; ++row) {
        const int64_t offset = row % ring * row_floats + begin * kLanes;
        for (int64_t at = 0; at < used; ++at) *next++ = {row, at, offset + at * kLanes};
      }
      auto point = [&](int, int64_t i) {
        return picture + (places[i].row * s.width + places[i].at) * s.in;
      };
      if (!weights) {
        const int64_t real = std::min(columns, s.out - channel0);
        for (int64_t i = 0; i < count; ++i) {
          float* target = z + places[i].offset;
          for (int64_t c = 0; c < columns; c += kLanes)
            Store(target + c * padded,
                  LoadSome(point(0, i) + channel0 + c, static_cast<int>(real - c)));
        }
      }
      if (weights.rounded) RoundRows(count, 1, s.in, point, rounded);
      for (int64_t p = 0; weights && p < panels; ++p) {
        const int width = PanelWidth(s, panel0 + p);
        for (int64_t r = 0; r < s.terms; ++r) {
          float* base = z + r * ring * row_floats + p * kPanel * padded;
          auto place = [&](int64_t i, int c, int) { return base + places[i].offset + c * padded; };
          auto sink = [&](int64_t i, int c, int vecs, const float* values) {
            float* target = place(i, c, vecs);
            const int64_t point = (image * s.height + places[i].row) * s.width + places[i].at;
            const float* add = inner + (point * s.terms + r) * s.out + channel0 + p * kPanel + c;
            const int64_t left = s.out - channel0 - p * kPanel - c;
            for (int v = 0; v < vecs; ++v) {
              Vec sum = Load(values + v * kLanes);
              if (inner && left > v * kLanes)
                sum += LoadSome(add + v * kLanes, static_cast<int>(left - v * kLanes));
              Store(target + v * kLanes * padded, sum);
            }
          };
          const int64_t depth = weights.rounded ? TiledDepth(s.in) : s.in;
          const int64_t at = (panel0 + p) * kPanel * depth * s.terms + r * depth * width;
          if (weights.rounded)
            TiledPanelProduct(width, count, s.in, rounded, weights.rounded + at, sink);
          else
            PanelProduct(width, count, 1, s.in, weights.whole + at,
                         {inner ? 0 : kLanes * padded}, point, place, sink);
        }
      }
      ready = need;
    }
    for (int64_t row = oh; row < stop;) {
      // Pooled rows are pairs, of which the first is even.
      const int lines = TwoLines(s) && row + 1 < stop && !(s.pool && row % 2) ? 2 : 1;
      const int64_t above = s.rows + lines - 1;
      for (int64_t i = 0; i < above; ++i) {
        const int64_t from = row * s.stride_h - s.top + i * s.dilation_h;
        const bool inside = from >= 0 && from < s.height;
        for (int64_t r = 0; r < s.terms; ++r)
          taps[r * above + i] = inside ? z + (r * ring + from % ring) * row_floats : zeros;
      }
      const int64_t pixel0 = (image * s.out_height + row) * s.out_width;
      if (s.pool) {
        float* half = pair + row % 2 * s.out_width * columns;
        AnyDepthwiseRows(s, lines, taps.data(), columns, channel0, depthwise, pixel0,
                         PooledEpilogue{epilogue, half, columns, channel0, pixel0});
      } else {
        AnyDepthwiseRows(s, lines, taps.data(), columns, channel0, depthwise, pixel0, epilogue);
      }
      row += lines;
      if (s.pool && row % 2 == 0)
        StorePooledRow(s, pair, columns, channel0, image, row / 2 - 1, epilogue);
    }
  }
}

using F32 = ffi::Buffer<ffi::F32>;

// Sizes of a convolution from its attributes: taps per axis and rank, strides, dilations, zeros
// before, and sizes of the output before pooling.
Shape MakeShape(F32 x, ffi::Span<const int64_t> taps, ffi::Span<const int64_t> geometry,
                ffi::Span<const int64_t> sizes) {
  const auto in = x.dimensions();
  Shape s{};
  s.batch = in[0], s.height = in[1], s.width = in[2], s.in = in[3];
  s.out_height = sizes[0], s.out_width = sizes[1], s.out = sizes[2];
  s.rows = taps[0], s.cols = taps[1], s.terms = taps[2];
  s.stride_h = geometry[0], s.stride_w = geometry[1];
  s.dilation_h = geometry[2], s.dilation_w = geometry[3];
  s.top = geometry[4], s.left = geometry[5];
  return s;
}

Epilogue MakeEpilogue(F32 bias, F32 residual, float* y, bool relu, int64_t out) {
  const float* added = residual.element_count() ? residual.typed_data() : nullptr;
  return Epilogue{bias.typed_data(), added, y, relu, out};
}

// Weights as they come; an error if this processor has no tiles for them.
ffi::ErrorOr<Weights> AnyWeights(const ffi::AnyBuffer& weights) {
  if (!weights.element_count()) return Weights{nullptr, nullptr};
  if (weights.element_type() == ffi::F32) return Weights{weights.typed_data<float>(), nullptr};
  if (!HasTiles()) return ffi::Unexpected(ffi::Error::Internal("no tiles for bfloat16"));
  return Weights{nullptr, static_cast<const uint16_t*>(weights.untyped_data())};
}

ffi::Error PointwiseDepthwise(ffi::ThreadPool pool, F32 x, ffi::AnyBuffer weights, F32 depthwise,
                              F32 bias, F32 residual, F32 inner, ffi::Span<const int64_t> taps,
                              ffi::Span<const int64_t> geometry, ffi::Span<const int64_t> sizes,
                              bool relu, bool pooled, ffi::ResultBuffer<ffi::F32> y) {
  if (y->element_count() == 0) return ffi::Error::Success();
  AskForHugePages(y->typed_data(), y->element_count());
  Shape s = MakeShape(x, taps, geometry, sizes);
  s.pool = pooled;
  const Epilogue epilogue = MakeEpilogue(bias, residual, y->typed_data(), relu, s.out);
  const auto pw = AnyWeights(weights);
  if (pw.has_error()) return pw.error();
  const Weights given = *pw;
  const Plan plan = MakePlan(s, Threads(pool), given.rounded);
  const int64_t panels = CeilDiv(s.out, kPanel), groups = CeilDiv(panels, plan.panels);
  const int64_t used = s.pool ? s.out_height / 2 * 2 : s.out_height;
  int64_t rows = CeilDiv(used, plan.chunks);
  if (s.pool) rows += rows % 2;
  const float *px = x.typed_data(), *pd = depthwise.typed_data();
  const float* pi = inner.element_count() ? inner.typed_data() : nullptr;
  RunTasks(pool, Threads(pool), s.batch * plan.chunks * groups, [=](int64_t task) {
    const int64_t group = task % groups, chunk = task / groups % plan.chunks;
    const int64_t image = task / groups / plan.chunks;
    const int64_t first = chunk * rows, last = std::min(first + rows, used);
    const int64_t panel0 = group * plan.panels;
    const auto tiles = given.rounded ? std::make_unique<Tiles>() : nullptr;
    if (first < last)
      PointwiseDepthwiseTask(s, plan, px, given, pd, pi, epilogue, image, first, last, panel0,
                             std::min(plan.panels, panels - panel0));
  });
  return ffi::Error::Success();
}

// Where output pixels find their input, segment after segment: a segment is a tap, or a row of taps
// whose input lies together; at the edges such a row is put together, with zeros.
struct Pointers {
  const Shape& s;
  const float* x;
  const float* zeros;  // as many as a segment has
  bool by_rows;

  int Segments() const { return static_cast<int>(by_rows ? s.rows : s.rows * s.cols); }
  int64_t Depth() const { return by_rows ? s.cols * s.in : s.in; }

  // Output columns whose rows of taps are put together.
  static int64_t Edges(const Shape& s) {
    if (s.dilation_w > 1) return s.out_width;
    const int64_t before = std::min(CeilDiv(s.left, s.stride_w), s.out_width);
    const int64_t fitting = s.width - s.cols + s.left;  // the last column's start
    const int64_t whole = fitting < 0 ? 0 : std::min(fitting / s.stride_w + 1, s.out_width);
    return before + s.out_width - std::max(whole, before);
  }
  // Floats that are put together for so many pixels, at most.
  int64_t Edged(int64_t count) const {
    const int64_t rows = CeilDiv(count, s.out_width) + 1;
    return by_rows ? std::min(count, rows * Edges(s)) * s.rows * Depth() : 0;
  }

  void Find(int64_t first, int64_t count, float* edged, std::vector<const float*>& to) const {
    to.resize(count * Segments());
    const float** next = to.data();
    std::vector<const float*> lines(s.rows);  // of the input, or null outside
    for (int64_t i = first; i < first + count;) {
      const int64_t line = i / s.out_width, image = line / s.out_height;
      const int64_t h = line % s.out_height * s.stride_h - s.top;
      for (int64_t j = 0; j < s.rows; ++j) {
        const int64_t row = h + j * s.dilation_h;
        const bool inside = row >= 0 && row < s.height;
        lines[j] = inside ? x + (image * s.height + row) * s.width * s.in : nullptr;
      }
      const int64_t end = std::min(first + count, (line + 1) * s.out_width);
      int64_t col = i % s.out_width * s.stride_w - s.left;
      for (; i < end; ++i, col += s.stride_w) {
        const bool whole = s.dilation_w == 1 && col >= 0 && col + s.cols <= s.width;
        for (const float* from : lines) {
          if (by_rows && (whole || !from)) {
            *next++ = from ? from + col * s.in : zeros;
            continue;
          }
          if (by_rows) *next++ = edged;
          for (int64_t q = 0; q < s.cols; ++q) {
            const int64_t at = col + q * s.dilation_w;
            const float* tap = from && at >= 0 && at < s.width ? from + at * s.in : zeros;
            if (by_rows) edged = std::copy(tap, tap + s.in, edged);
            else *next++ = tap;
          }
        }
      }
    }
  }
};

// Windows of a pooling, over maps of some size.
struct Windows {
  int64_t tall, wide, stride_h, stride_w, top, left;

  static Windows Of(ffi::Span<const int64_t> taps, ffi::Span<const int64_t> geometry) {
    return {taps[0], taps[1], geometry[0], geometry[1], geometry[2], geometry[3]};
  }

  // Maxima of one row of windows, channels [begin, end); what is outside counts as nothing. `map`
  // is where the first row of the map stands, `y` where the row's first window goes.
  void Row(const float* map, int64_t height, int64_t width, int64_t channels, int64_t row,
           int64_t count, int64_t begin, int64_t end, float* y) const {
    const int64_t h = row * stride_h - top;
    const int64_t h0 = std::max<int64_t>(h, 0), h1 = std::min(h + tall, height);
    for (int64_t w = 0; w < count; ++w) {
      const int64_t edge = w * stride_w - left;
      const int64_t w0 = std::max<int64_t>(edge, 0), w1 = std::min(edge + wide, width);
      for (int64_t c = begin; c < end; c += kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(end - c, kLanes));
        Vec most = Vec{} - __builtin_inff();
        auto all = [&](auto&& load) {
          for (int64_t i = h0; i < h1; ++i) {
            const float* from = map + (i * width + w0) * channels + c;
            for (int64_t j = w0; j < w1; ++j, from += channels) most = Max(most, load(from));
          }
        };
        if (n == kLanes)
          all([](const float* p) { return Load(p); });
        else
          all([n](const float* p) { return LoadSome(p, n); });
        StoreSome(y + w * channels + c, most, n);
      }
    }
  }
};

// A standard convolution, or a pointwise one: rows of the product are output pixels, segments taps.
struct Standard {
  Shape s;
  Weights weights;
  const float* x;
  std::shared_ptr<std::vector<float>> zeros;
  bool few, by_rows, plain;
  int64_t depth;

  Standard(const Shape& shape, const Weights& given, const float* input)
      : s(shape), weights(given), x(input),
        zeros(std::make_shared<std::vector<float>>(s.cols * s.in, 0.0f)),
        few(s.rows * s.cols > 1 && s.in < kFewChannels),
        by_rows(few || (s.cols > 1 && 4 * Pointers::Edges(s) <= s.out_width)),
        plain(s.rows == 1 && s.cols == 1 && s.stride_h == 1 && s.stride_w == 1 && s.top == 0 &&
              s.left == 0),
        depth(s.in * s.rows * s.cols) {}

  int64_t Tile() const { return weights.rounded ? 32 : 24; }

  // Pixels at a time: enough to use a panel again, and few enough that what they see of the input
  // stays in the cache. Where that is put together first, it is as large as the product's side.
  int64_t Most() const {
    int64_t fitting = 2 * kPutTogether / std::max<int64_t>(depth, 1);
    if (!few && !weights.rounded) {
      const int64_t halo = (s.rows - 1) * s.dilation_h + 1 - s.stride_h;
      const int64_t seen = kSeenFloats / std::max<int64_t>(s.width * s.in, 1);
      fitting = (seen - std::max<int64_t>(halo, 0)) / s.stride_h * s.out_width;
    }
    return std::min<int64_t>(std::max(Tile(), fitting / Tile() * Tile()), kMostRows);
  }

  // Output pixels [first, first + count) of panels [begin, end).
  void Pixels(const Epilogue& epilogue, int64_t first, int64_t count, int64_t begin,
              int64_t end) const {
    const Pointers pointers{s, x, zeros->data(), by_rows};
    const int segments = pointers.Segments();
    const int64_t edged_floats = pointers.Edged(count);
    const int64_t rounded_floats = weights.rounded ? (count + 32) * TiledStride(depth) / 2 : 0;
    float* edged = Scratch(edged_floats + rounded_floats);
    auto* rounded = reinterpret_cast<uint16_t*>(edged + edged_floats);
    std::vector<const float*> points;
    if (!plain) pointers.Find(first, count, edged, points);
    auto point = [&](int segment, int64_t i) {
      return plain ? x + (first + i) * s.in : points[i * segments + segment];
    };
    const auto tiles = weights.rounded ? std::make_unique<Tiles>() : nullptr;
    if (weights.rounded) RoundRows(count, segments, pointers.Depth(), point, rounded);
    for (int64_t p = begin; p < end; ++p) {
      const int width = PanelWidth(s, p);
      const bool direct = !epilogue.residual && p * kPanel + width <= s.out;
      auto place = [&](int64_t i, int c, int) {
        return epilogue.y + (first + i) * s.out + p * kPanel + c;
      };
      auto sink = [&](int64_t i, int c, int vecs, const float* values) {
        for (int v = 0; v < vecs; ++v)
          epilogue.Put(first + i, p * kPanel + c + v * kLanes, Load(values + v * kLanes));
      };
      const int64_t at = p * kPanel * (weights.rounded ? TiledDepth(depth) : depth);
      if (weights.rounded)
        TiledPanelProduct(width, count, depth, rounded, weights.rounded + at, sink);
      else
        PanelProduct(width, count, segments, pointers.Depth(), weights.whole + at,
                     {direct ? kLanes : 0, epilogue.bias + p * kPanel, epilogue.relu}, point,
                     place, sink);
    }
  }
};

// Panels of a task, so that there are tasks for all threads.
int64_t PanelsOfTask(int64_t panels, int64_t tasks, int64_t threads) {
  int64_t groups = 1;
  while (groups < panels && tasks * groups < 2 * threads) ++groups;
  return CeilDiv(panels, groups);
}

void Whole(ffi::ThreadPool& pool, int64_t threads, const Standard& conv, const Epilogue& epilogue) {
  const Shape& s = conv.s;
  const int64_t pixels = s.batch * s.out_height * s.out_width, panels = CeilDiv(s.out, kPanel);
  int64_t blocks = CeilDiv(pixels, conv.Most());
  if (blocks > 1) blocks = CeilDiv(blocks, threads) * threads;
  const int64_t block = CeilDiv(CeilDiv(pixels, blocks), conv.Tile()) * conv.Tile();
  blocks = CeilDiv(pixels, block);
  const int64_t each = PanelsOfTask(panels, blocks, threads);
  RunTasks(pool, threads, blocks * CeilDiv(panels, each), [=](int64_t task) {
    const int64_t panel = task / blocks * each, first = task % blocks * block;
    conv.Pixels(epilogue, first, std::min(block, pixels - first), panel,
                std::min(panels, panel + each));
  });
}

// Rows of the convolution that a few rows of windows see stay in the cache; only maxima are stored.
void Pooled(ffi::ThreadPool& pool, int64_t threads, const Standard& conv, const Epilogue& epilogue,
            const Windows& windows, int64_t height, int64_t width) {
  const Shape& s = conv.s;
  const int64_t panels = CeilDiv(s.out, kPanel), line = s.out_width * s.out;
  const int64_t fitting = (kSeenFloats / line - windows.tall) / windows.stride_h + 1;
  const int64_t strip = std::clamp<int64_t>(
      std::min(fitting, height * s.batch / (2 * threads)), 1, height);
  const int64_t strips = CeilDiv(height, strip), tasks = s.batch * strips;
  const int64_t each = PanelsOfTask(panels, tasks, threads), block = conv.Most();
  RunTasks(pool, threads, tasks * CeilDiv(panels, each), [=](int64_t task) {
    const int64_t panel = task / tasks * each, last = std::min(panels, panel + each);
    const int64_t image = task % tasks / strips, row0 = task % strips * strip;
    const int64_t row1 = std::min(height, row0 + strip);
    const int64_t from = std::max<int64_t>(row0 * windows.stride_h - windows.top, 0);
    const int64_t to = std::min((row1 - 1) * windows.stride_h - windows.top + windows.tall,
                                s.out_height);
    const int64_t first = (image * s.out_height + from) * s.out_width;
    const int64_t end = first + std::max<int64_t>(to - from, 0) * s.out_width;
    float* rows = Scratch<1>((end - first) * s.out);
    Epilogue kept = epilogue;
    kept.y = rows - first * s.out;
    for (int64_t at = first; at < end; at += block)
      conv.Pixels(kept, at, std::min(block, end - at), panel, last);
    for (int64_t row = row0; row < row1; ++row)
      windows.Row(rows - from * line, s.out_height, s.out_width, s.out, row, width,
                  panel * kPanel, std::min(last * kPanel, s.out),
                  epilogue.y + (image * height + row) * width * s.out);
  });
}

ffi::Error Convolution(ffi::ThreadPool pool, F32 x, ffi::AnyBuffer weights, F32 bias, F32 residual,
                       ffi::Span<const int64_t> taps, ffi::Span<const int64_t> geometry,
                       ffi::Span<const int64_t> sizes, bool relu,
                       ffi::Span<const int64_t> window, ffi::Span<const int64_t> window_geometry,
                       ffi::ResultBuffer<ffi::F32> y) {
  if (y->element_count() == 0) return ffi::Error::Success();
  AskForHugePages(y->typed_data(), y->element_count());
  const Shape s = MakeShape(x, taps, geometry, sizes);
  const auto pw = AnyWeights(weights);
  if (pw.has_error()) return pw.error();
  const Standard conv(s, *pw, x.typed_data());
  const Epilogue epilogue = MakeEpilogue(bias, residual, y->typed_data(), relu, s.out);
  // Waiting for other threads takes longer than little work.
  const double products = double(s.batch * s.out_height * s.out_width) * conv.depth * s.out;
  const int64_t threads = products / (conv.weights.rounded ? 256 : 32) < 2e4 ? 1 : Threads(pool);
  if (window[0] == 0) {
    Whole(pool, threads, conv, epilogue);
  } else {
    const auto out = y->dimensions();
    Pooled(pool, threads, conv, epilogue, Windows::Of(window, window_geometry), out[1], out[2]);
  }
  return ffi::Error::Success();
}

// Maxima over windows; what is outside counts as nothing.
ffi::Error MaxPool(ffi::ThreadPool pool, F32 x, ffi::Span<const int64_t> taps,
                   ffi::Span<const int64_t> geometry, ffi::ResultBuffer<ffi::F32> y) {
  if (y->element_count() == 0) return ffi::Error::Success();
  AskForHugePages(y->typed_data(), y->element_count());
  const auto in = x.dimensions(), out = y->dimensions();
  const int64_t height = in[1], width = in[2], channels = in[3];
  const int64_t out_height = out[1], out_width = out[2], rows = in[0] * out_height;
  const Windows windows = Windows::Of(taps, geometry);
  const float* px = x.typed_data();
  float* py = y->typed_data();
  const int64_t each = std::max<int64_t>(1, kStepPoints * 64 / (out_width * channels) + 1);
  RunTasks(pool, Threads(pool), CeilDiv(rows, each), [=](int64_t task) {
    for (int64_t row = task * each; row < std::min(rows, (task + 1) * each); ++row)
      windows.Row(px + row / out_height * height * width * channels, height, width, channels,
                  row % out_height, out_width, 0, channels, py + row * out_width * channels);
  });
  return ffi::Error::Success();
}

// y[a, i, b] = sum_t weights[i, t] * x[a, places[i, t], b]: interpolation along one axis.
ffi::Error AlongAxis(ffi::ThreadPool pool, F32 x, F32 weights, ffi::Buffer<ffi::S32> places,
                     ffi::ResultBuffer<ffi::F32> y) {
  if (y->element_count() == 0) return ffi::Error::Success();
  AskForHugePages(y->typed_data(), y->element_count());
  const int64_t n = x.dimensions()[1], inner = x.dimensions()[2];
  const int64_t m = weights.dimensions()[0], terms = weights.dimensions()[1];
  const int64_t rows = x.dimensions()[0] * m;
  const float *px = x.typed_data(), *pw = weights.typed_data();
  const int32_t* at = places.typed_data();
  float* py = y->typed_data();
  const int64_t each = std::max<int64_t>(1, 16384 / inner);
  RunTasks(pool, Threads(pool), CeilDiv(rows, each), [=](int64_t task) {
    for (int64_t row = task * each; row < std::min(rows, (task + 1) * each); ++row) {
      const int64_t i = row % m;
      const float* from = px + row / m * n * inner;
      for (int64_t b = 0; b < inner; b += kLanes) {
        const int count = static_cast<int>(std::min<int64_t>(inner - b, kLanes));
        Vec sum = {};
        for (int64_t t = 0; t < terms; ++t)
          sum += pw[i * terms + t] * LoadSome(from + at[i * terms + t] * inner + b, count);
        StoreSome(py + row * inner + b, sum, count);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#define FALCON_SPAN ffi::Span<const int64_t>
XLA_FFI_DEFINE_HANDLER_SYMBOL(FalconPointwiseDepthwise, PointwiseDepthwise,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Attr<FALCON_SPAN>("taps")
                                  .Attr<FALCON_SPAN>("geometry")
                                  .Attr<FALCON_SPAN>("sizes")
                                  .Attr<bool>("relu")
                                  .Attr<bool>("pool")
                                  .Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(FalconConvolution, Convolution,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Attr<FALCON_SPAN>("taps")
                                  .Attr<FALCON_SPAN>("geometry")
                                  .Attr<FALCON_SPAN>("sizes")
                                  .Attr<bool>("relu")
                                  .Attr<FALCON_SPAN>("window")
                                  .Attr<FALCON_SPAN>("window_geometry")
                                  .Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(FalconMaxPool, MaxPool,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Attr<FALCON_SPAN>("taps")
                                  .Attr<FALCON_SPAN>("geometry")
                                  .Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(FalconAlongAxis, AlongAxis,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<F32>());

extern "C" bool FalconHasTiles() { return HasTiles(); }
