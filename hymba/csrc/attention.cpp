// Grouped-query attention over keys in several places, forward and backward, in blocks that never form a T x S matrix
// (Dao, "FlashAttention-2", arXiv 2307.08691). For a query q at a position, keys k and values v that it may see:
//
//     s = scale q.k     p = exp(s - L), L = log sum exp(s)     y = sum p v
//     dv = sum_q p dy   ds = p (dy.v - dy.y)   dq = scale sum_k ds k   dk = scale sum_q ds q
//
// Tiling. The R = H / G query heads that read one key head are R rows of one matrix: a query block is up to kRows rows
// (tokens x R), a key block up to kKeys keys of one source. One unit of work is (row of the batch, key head, query
// block), and for few queries (decoding) also a range of keys, whose partial results are joined afterwards. Which unit
// runs on which thread changes nothing in the results.
//
// Visibility is the rule of hymba/visibility.py, on positions and documents. A block of keys is skipped if the smallest
// and largest positions (documents) say that none is visible, and goes unmasked if they say that all are.
//
// Products are of 32-bit units: float, or a pair of bfloat16 where the processor has their dot product with float32
// sums (AVX512_BF16). Left factors are read unit by unit, right factors in packed rows. Scores, exponentials, sums and
// accumulators are float32; p and ds are rounded to bfloat16 in the second case only. Logarithms are to base 2. Matrix tiles
// take the two factors as they lie.
#include "elementwise.h"
#include "tiles.h"

namespace hymba {
namespace HYMBA_ISA {
namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kCols = 2;  // 6 x 2 accumulators in 16 registers
#elif defined(__x86_64__) && !defined(__AVX2__)
constexpr int kCols = 2;
#else
constexpr int kCols = 4;  // 6 x 4 accumulators in 32 registers
#endif
constexpr int kTileRows = 6;
constexpr int kRows = 128, kKeys = 128;     // a query block, a key block (forward)
#if defined(HYMBA_AMX)
constexpr int kSlice = 32;                  // query rows that stay in the first cache between the two products
#else
constexpr int kSlice = 24;
#endif
constexpr int kSplit = 512;                 // keys in a unit of decoding
constexpr int kMaxSources = 16;
constexpr float kNothing = -1e30f;          // running maximum before any key
constexpr int32_t kEmpty = 0x7fffffff;      // EMPTY in visibility.py

struct KeySource {
  const void *k, *v;                        // (B or 1, G, S, dk), (B or 1, G, S, dv), the last contiguous
  int64_t S, k_row, k_head, k_step, v_row, v_head, v_step;
  const int64_t* positions;                 // (B or 1, S)
  int64_t positions_row;
  const int64_t* documents;                 // (B, S) or null
  int64_t first;                            // of this source among all keys
};

struct AttentionArgs {
  int64_t type, n_threads, B, H, G, T, dk, dv;
  const void* q;                            // (B, H, T, dk)
  int64_t q_row, q_head, q_step;
  const int64_t* positions;                 // (B or 1, T)
  int64_t positions_row;
  const int64_t* documents;                 // (B, T) or null
  int64_t window;                           // negative: full attention
  int64_t n_meta;
  double scale;
  void* y;                                  // (B, T, H dv)
  float* lse;                               // (B, H, T), base 2; or null
  // backward
  const void* gy;                           // (B, T, H dv)
  int64_t gy_row, gy_step;
  void* dq;                                 // (B, H, T, dk)
  float *dk_out, *dv_out;                   // (parts, B, G, S of all sources, dk | dv), zero before
  int64_t parts;
  int64_t n_sources;
  KeySource sources[kMaxSources];
};

// ---- what is visible

struct KeyBlock {
  int64_t source, first, count;
  int32_t least, most;                      // positions
  int32_t least_document, most_document;
};

// Positions and documents of all keys as the kernels want them: in blocks of kBlock, int32, the last one padded.
struct KeyTable {
  int64_t block_keys, n_blocks;             // of each row
  KeyBlock* blocks;                         // (B, n_blocks)
  int32_t *positions, *documents;           // (B, n_blocks, block_keys)
};

KeyTable make_table(const AttentionArgs& a, int64_t block_keys) {
  KeyTable t{block_keys, 0, nullptr, nullptr, nullptr};
  for (int64_t i = 0; i < a.n_sources; i++) t.n_blocks += ceil_div(a.sources[i].S, block_keys);
  const int64_t total = a.B * t.n_blocks;
  char* memory = static_cast<char*>(scratch(7, total * (sizeof(KeyBlock) + 8 * block_keys) + 64));
  t.positions = reinterpret_cast<int32_t*>(memory);
  t.documents = t.positions + total * block_keys;
  t.blocks = reinterpret_cast<KeyBlock*>(t.documents + total * block_keys);
  int64_t at = 0;
  for (int64_t b = 0; b < a.B; b++)
    for (int64_t i = 0; i < a.n_sources; i++) {
      const KeySource& source = a.sources[i];
      for (int64_t first = 0; first < source.S; first += block_keys, at++) {
        KeyBlock block{i, first, min(block_keys, source.S - first), kEmpty, -kEmpty, kEmpty, -kEmpty};
        for (int64_t j = 0; j < block_keys; j++) {
          int32_t position = kEmpty, document = 0;
          if (j < block.count) {
            position = static_cast<int32_t>(source.positions[b * source.positions_row + first + j]);
            if (source.documents) document = static_cast<int32_t>(source.documents[b * source.S + first + j]);
            block.least_document = min(block.least_document, document);
            block.most_document = max(block.most_document, document);
          }
          block.least = min(block.least, position);
          block.most = max(block.most, position);
          t.positions[at * block_keys + j] = position;
          t.documents[at * block_keys + j] = document;
        }
        t.blocks[at] = block;
      }
    }
  return t;
}

// The tokens of a query block: positions and documents, smallest and largest.
struct Queries {
  int64_t b, first, count;                  // tokens
  int32_t least, most, least_document, most_document;
};

Queries queries_at(const AttentionArgs& a, int64_t b, int64_t first, int64_t count) {
  Queries q{b, first, count, kEmpty, -kEmpty, kEmpty, -kEmpty};
  for (int64_t t = first; t < first + count; t++) {
    const int32_t position = static_cast<int32_t>(a.positions[b * a.positions_row + t]);
    const int32_t document = a.documents ? static_cast<int32_t>(a.documents[b * a.T + t]) : 0;
    q.least = min(q.least, position), q.most = max(q.most, position);
    q.least_document = min(q.least_document, document), q.most_document = max(q.most_document, document);
  }
  return q;
}

enum class See { kNone, kSome, kAll };

See visible(const AttentionArgs& a, const Queries& q, const KeyBlock& k) {
  if (k.least > q.most) return See::kNone;
  const int64_t nearest = int64_t{q.least} - k.most, farthest = int64_t{q.most} - k.least;
  if (a.window >= 0 && nearest > a.window && k.least >= a.n_meta) return See::kNone;
  bool all = k.most <= q.least && (a.window < 0 || farthest <= a.window || k.most < a.n_meta);
  if (a.documents && a.sources[k.source].documents) {
    if (k.least_document > q.most_document || k.most_document < q.least_document) return See::kNone;
    all = all && q.least_document == q.most_document && k.least_document == k.most_document &&
          q.least_document == k.least_document;
  }
  return all ? See::kAll : See::kSome;
}

struct Rule {
  int32_t window, n_meta;
  bool documents;
};
Rule rule_of(const AttentionArgs& a, const KeyBlock& k) {
  return {a.window < 0 ? kEmpty : static_cast<int32_t>(min<int64_t>(a.window, kEmpty)),
          static_cast<int32_t>(a.n_meta), a.documents && a.sources[k.source].documents};
}

// visibility.visible and same_document, for vectors of queries or keys; all bits set where visible
HYMBA_INLINE vi may_see(const Rule& rule, vi q, vi k, vi q_document, vi k_document) {
  vi see = (k <= q) & ((q - k <= rule.window) | (k < rule.n_meta));
  if (rule.documents) see &= q_document == k_document;
  return see;
}
HYMBA_INLINE vi load_int(const int32_t* p) { return (vi)load(reinterpret_cast<const float*>(p)); }
HYMBA_INLINE vi splat_int(int32_t x) { return vi{} + x; }

// ---- products of units

// Whether products of T run on pairs of bfloat16.
template <class T>
constexpr bool kPairs = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool kPairs<bf16> = true;
#endif
template <class T>
constexpr int kUnit = kPairs<T> ? 2 : 1;  // elements in a unit

template <bool Pairs>
HYMBA_INLINE vf dot(vf sum, float left, vf right) {
#if defined(__AVX512BF16__)
  if constexpr (Pairs) {
    int32_t bits;
    __builtin_memcpy(&bits, &left, 4);
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)right);
  }
#endif
  return splat(left) * right + sum;
}

// One tile: M rows x N vectors of C = C * keep + left right. left: (M, units), right: (units, columns)
template <bool Pairs, int M, int N>
inline void product_tile(float* C, int64_t C_step, const float* left, int64_t left_step, const float* right,
                         int64_t right_step, int64_t units, const float* keep, bool add) {
  vf sum[M][N];
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      sum[m][n] = zero();
      if (add) sum[m][n] = load(C + m * C_step + n * kW);
      if (keep) sum[m][n] *= keep[m];
    }
  for (int64_t u = 0; u < units; u++) {
    vf r[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) r[n] = load(right + u * right_step + n * kW);
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[m][n] = dot<Pairs>(sum[m][n], left[m * left_step + u], r[n]);
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(C + m * C_step + n * kW, sum[m][n]);
}

template <bool Pairs, int M>
void product_rows(float* C, int64_t C_step, const float* left, int64_t left_step, const float* right,
                  int64_t right_step, int64_t units, int64_t columns, const float* keep, bool add) {
  int64_t j = 0;
  for (; j + kCols * kW <= columns; j += kCols * kW)
    product_tile<Pairs, M, kCols>(C + j, C_step, left, left_step, right + j, right_step, units, keep, add);
  for (; j < columns; j += kW)
    product_tile<Pairs, M, 1>(C + j, C_step, left, left_step, right + j, right_step, units, keep, add);
}

#if defined(HYMBA_AMX)
// 16 rows (or the last few) and N <= 4 times 16 columns, for the units from `unit` on in steps of `step` <= 16, which divides
// what is left of them: C = left right, plus C if `add`
template <int N>
void tile_columns(Tiles& tiles, float* C, int64_t C_step, const float* left, int64_t left_step, const float* right,
                  int64_t right_step, int rows, int64_t unit, int64_t units, int step, bool add) {
  const int64_t C_bytes = C_step * 4, left_bytes = left_step * 4, right_bytes = right_step * 4;
  tiles.use(rows, 4 * step);
  if (!add) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, C, C_bytes);
    if constexpr (N > 1) _tile_loadd(1, C + 16, C_bytes);
    if constexpr (N > 2) _tile_loadd(2, C + 32, C_bytes);
    if constexpr (N > 3) _tile_loadd(3, C + 48, C_bytes);
  }
  for (int64_t u = unit; u < units; u += step) {
    const float* r = right + u * right_step;
    _tile_loadd(4, left + u, left_bytes);
    _tile_loadd(5, r, right_bytes);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N > 1) {
      _tile_loadd(6, r + 16, right_bytes);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (N > 2) {
      _tile_loadd(7, r + 32, right_bytes);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (N > 3) {
      _tile_loadd(5, r + 48, right_bytes);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, C, C_bytes);
  if constexpr (N > 1) _tile_stored(1, C + 16, C_bytes);
  if constexpr (N > 2) _tile_stored(2, C + 32, C_bytes);
  if constexpr (N > 3) _tile_stored(3, C + 48, C_bytes);
}

void product_by_tiles(Tiles& tiles, float* C, int64_t C_step, const float* left, int64_t left_step, const float* right,
                      int64_t right_step, int64_t rows, int64_t units, int64_t columns, bool add, const float* keep) {
  if (keep)
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j += kW) store(C + i * C_step + j, load(C + i * C_step + j) * keep[i]);
  written(C);
  const int64_t whole = units / 16 * 16;
  // whole steps first, then what is left of the units
  for (int64_t unit = 0; unit < units; unit = unit < whole ? whole : units, add = true) {
    const int64_t stop = unit < whole ? whole : units;
    const int step = static_cast<int>(min<int64_t>(16, units - unit));
    for (int64_t i = 0; i < rows; i += 16) {
      const int n = static_cast<int>(min<int64_t>(16, rows - i));
      const float* l = left + i * left_step;
      for (int64_t j = 0; j < columns; j += 64) {
        float* c = C + i * C_step + j;
        const float* r = right + j;
        switch (min<int64_t>(64, columns - j) / 16) {
          case 1: tile_columns<1>(tiles, c, C_step, l, left_step, r, right_step, n, unit, stop, step, add); break;
          case 2: tile_columns<2>(tiles, c, C_step, l, left_step, r, right_step, n, unit, stop, step, add); break;
          case 3: tile_columns<3>(tiles, c, C_step, l, left_step, r, right_step, n, unit, stop, step, add); break;
          default: tile_columns<4>(tiles, c, C_step, l, left_step, r, right_step, n, unit, stop, step, add); break;
        }
      }
    }
  }
}
#endif

// C (rows, columns) = left (rows, units) right (units, columns), plus C if `add`, times keep (rows,) if that is given.
// columns is a multiple of kW; steps are in floats.
template <bool Pairs>
void product(Tiles& tiles, float* C, int64_t C_step, const float* left, int64_t left_step, const float* right, int64_t right_step,
             int64_t rows, int64_t units, int64_t columns, bool add, const float* keep = nullptr) {
#if defined(HYMBA_AMX)
  if constexpr (Pairs)
    return product_by_tiles(tiles, C, C_step, left, left_step, right, right_step, rows, units, columns, add, keep);
#endif
  (void)tiles;
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    product_rows<Pairs, kTileRows>(C + i * C_step, C_step, left + i * left_step, left_step, right, right_step, units,
                                   columns, keep ? keep + i : nullptr, add);
  float* Ci = C + i * C_step;
  const float *li = left + i * left_step, *ki = keep ? keep + i : nullptr;
  switch (rows - i) {
    case 1: return product_rows<Pairs, 1>(Ci, C_step, li, left_step, right, right_step, units, columns, ki, add);
    case 2: return product_rows<Pairs, 2>(Ci, C_step, li, left_step, right, right_step, units, columns, ki, add);
    case 3: return product_rows<Pairs, 3>(Ci, C_step, li, left_step, right, right_step, units, columns, ki, add);
    case 4: return product_rows<Pairs, 4>(Ci, C_step, li, left_step, right, right_step, units, columns, ki, add);
    case 5: return product_rows<Pairs, 5>(Ci, C_step, li, left_step, right, right_step, units, columns, ki, add);
    default: return;
  }
}

// ---- bringing matrices into units

typedef uint32_t unit_any __attribute__((aligned(4), may_alias));

// One row of d elements as units, zero from there to `units`.
template <class T>
HYMBA_INLINE void units_of_row(float* to, const T* from, int64_t d, int64_t units) {
  if constexpr (kPairs<T>) {
    __builtin_memcpy(to, from, d * 2);
    if (d < 2 * units) __builtin_memset(reinterpret_cast<bf16*>(to) + d, 0, (2 * units - d) * 2);
  } else {
    to_floats(to, from, d);
    for (int64_t i = d; i < units; i++) to[i] = 0;
  }
}

// to (rows, columns) of floats -> transposed (columns, rows); both multiples of kW
void transpose_units(float* to, int64_t to_step, const float* from, int64_t from_step, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += kW)
    for (int64_t j = 0; j < columns; j += kW)
      transpose(to + j * to_step + i, to_step, from + i * from_step + j, from_step);
}

// A right factor for products over the rows of a matrix: unit (r, c) holds rows kUnit r ... of column c.
// row(i): pointer to row i. to: (ceil(rows / kUnit), columns), zero beyond rows and d.
template <class T, class Row>
void stack_rows(float* to, int64_t columns, const Row& row, int64_t rows, int64_t d) {
  if constexpr (kPairs<T>) {
    for (int64_t i = 0; i < rows; i += 2) {
      const bf16 *even = row(i), *odd = i + 1 < rows ? row(i + 1) : nullptr;
      float* out = to + i / 2 * columns;
      for (int64_t j = 0; j < columns; j += kW) {
        const int64_t n = max<int64_t>(0, min<int64_t>(kW, d - j));
        const vu low = (vu)load_n(even + j, n) >> 16;
        const vu high = odd ? (vu)load_n(odd + j, n) : vu{};
        store(out + j, (vf)(low | high));
      }
    }
  } else {
    for (int64_t i = 0; i < rows; i++) units_of_row(to + i * columns, row(i), d, columns);
  }
}

// n floats as elements of a left factor's row, in place order
template <bool Pairs>
HYMBA_INLINE void store_elements(float* row, int64_t index, vf x) {
  if constexpr (Pairs)
    store(reinterpret_cast<bf16*>(row) + index, x);
  else
    store(row + index, x);
}

template <class T>
const T* key(const AttentionArgs& a, const KeyBlock& block, int64_t b, int64_t g, int64_t i) {
  const KeySource& s = a.sources[block.source];
  return static_cast<const T*>(s.k) + b * s.k_row + g * s.k_head + (block.first + i) * s.k_step;
}
template <class T>
const T* value(const AttentionArgs& a, const KeyBlock& block, int64_t b, int64_t g, int64_t i) {
  const KeySource& s = a.sources[block.source];
  return static_cast<const T*>(s.v) + b * s.v_row + g * s.v_head + (block.first + i) * s.v_step;
}

// ---- forward

struct Plan {
  int64_t R, tokens, blocks;                // query heads of a key head, tokens in a query block, query blocks
  int64_t dk_units, dk_padded, dv_padded;   // padded to kW
  int64_t splits;                           // ranges of key blocks that are separate units; 1 unless there are few queries
  int64_t split_blocks;
};

template <class T>
Plan plan_of(const AttentionArgs& a, const KeyTable& table) {
  Plan p;
  p.R = a.H / a.G;
  p.tokens = max<int64_t>(1, min<int64_t>(a.T, kRows / p.R));
  p.blocks = ceil_div(a.T, p.tokens);
  p.dk_units = ceil_div(a.dk, kUnit<T>);
  p.dk_padded = round_up(p.dk_units, kW);
  p.dv_padded = round_up(a.dv, kW);
  p.split_blocks = p.blocks == 1 ? kSplit / table.block_keys : table.n_blocks;
  p.splits = max<int64_t>(1, ceil_div(table.n_blocks, max<int64_t>(1, p.split_blocks)));
  return p;
}

// The largest score and the sum of a unit, by row, and its unnormalised output.
struct Partial {
  float *most, *sum, *y;                    // (rows,), (rows,), (rows, dv_padded)
};

// Rows of a query block in memory: row = token * R + r
template <class T>
const T* query(const AttentionArgs& a, const Plan& p, const Queries& q, int64_t g, int64_t row) {
  return static_cast<const T*>(a.q) + q.b * a.q_row + (g * p.R + row % p.R) * a.q_head +
         (q.first + row / p.R) * a.q_step;
}

// All key blocks from block0 to block1 for one query block and key head.
template <class T>
void forward_unit(const AttentionArgs& a, const Plan& p, const KeyTable& table, const Queries& q, int64_t g,
                  int64_t block0, int64_t block1, Partial out) {
  constexpr bool Pairs = kPairs<T>;
  Tiles tiles;
  const int64_t rows = q.count * p.R, keys = table.block_keys;
  float* left = static_cast<float*>(scratch(0, rows * p.dk_padded * 4));
  float* kt = static_cast<float*>(scratch(1, p.dk_padded * keys * 4));
  float* vs = static_cast<float*>(scratch(2, keys / kUnit<T> * p.dv_padded * 4));
  float* natural = static_cast<float*>(scratch(3, keys * p.dk_padded * 4));
  float* scores = static_cast<float*>(scratch(4, kSlice * keys * 4));
  float keep[kSlice];
  int32_t row_position[kSlice], row_document[kSlice];

  for (int64_t i = 0; i < rows; i++) {
    units_of_row(left + i * p.dk_padded, query<T>(a, p, q, g, i), a.dk, p.dk_padded);
    out.most[i] = kNothing, out.sum[i] = 0;
  }
  __builtin_memset(out.y, 0, rows * p.dv_padded * 4);
  const vf scale = splat(static_cast<float>(a.scale) * kLog2e);

  for (int64_t index = block0; index < block1; index++) {
    const KeyBlock& block = table.blocks[q.b * table.n_blocks + index];
    const See see = visible(a, q, block);
    if (see == See::kNone) continue;
    const Rule rule = rule_of(a, block);
    const int32_t* positions = table.positions + (q.b * table.n_blocks + index) * keys;
    const int32_t* documents = table.documents + (q.b * table.n_blocks + index) * keys;
    const int64_t columns = round_up(block.count, kW);
    for (int64_t i = 0; i < block.count; i++)
      units_of_row(natural + i * p.dk_padded, key<T>(a, block, q.b, g, i), a.dk, p.dk_padded);
    __builtin_memset(natural + block.count * p.dk_padded, 0, (columns - block.count) * p.dk_padded * 4);
    transpose_units(kt, keys, natural, p.dk_padded, columns, p.dk_padded);
    stack_rows<T>(vs, p.dv_padded, [&](int64_t i) { return value<T>(a, block, q.b, g, i); }, block.count, a.dv);

    for (int64_t row0 = 0; row0 < rows; row0 += kSlice) {
      const int64_t count = min<int64_t>(kSlice, rows - row0);
      product<Pairs>(tiles, scores, keys, left + row0 * p.dk_padded, p.dk_padded, kt, keys, count, p.dk_units, columns, false);
      if (see == See::kSome)
        for (int64_t i = 0; i < count; i++) {
          const int64_t t = q.first + (row0 + i) / p.R;
          row_position[i] = static_cast<int32_t>(a.positions[q.b * a.positions_row + t]);
          row_document[i] = a.documents ? static_cast<int32_t>(a.documents[q.b * a.T + t]) : 0;
        }
      for (int64_t i = 0; i < count; i++) {
        float* s = scores + i * keys;
        vf high = splat(-__builtin_inff());
        for (int64_t j = 0; j < columns; j += kW) {
          vf x = load(s + j) * scale;
          if (see == See::kSome) {
            const vi mask = may_see(rule, splat_int(row_position[i]), load_int(positions + j),
                                    splat_int(row_document[i]), load_int(documents + j));
            x = mask ? x : splat(-__builtin_inff());
          }
          store(s + j, x);
          high = vmax(high, x);
        }
        const float before = out.most[row0 + i], most = max(before, largest(high));
        const vf shift = splat(most);
        vf sums = zero();
        for (int64_t j = 0; j < columns; j += kW) {
          const vf e = exp2(load(s + j) - shift);
          sums += e;
          store_elements<Pairs>(s, j, e);  // behind where the scores are read
        }
        keep[i] = exp2(splat(before - most))[0];
        out.most[row0 + i] = most;
        out.sum[row0 + i] = out.sum[row0 + i] * keep[i] + sum(sums);
      }
      // in pairs, columns beyond an odd count are zero: their scores are masked
      product<Pairs>(tiles, out.y + row0 * p.dv_padded, p.dv_padded, scores, keys, vs, p.dv_padded, count,
                     ceil_div(block.count, kUnit<T>), p.dv_padded, true, keep);
    }
  }
}

// Writes the rows of a query block from `splits` partial results.
template <class T>
void finish(const AttentionArgs& a, const Plan& p, const Queries& q, int64_t g, const Partial* parts, int64_t splits) {
  for (int64_t i = 0; i < q.count * p.R; i++) {
    float most = kNothing, total = 0;
    for (int64_t s = 0; s < splits; s++) most = max(most, parts[s].most[i]);
    for (int64_t s = 0; s < splits; s++) total += parts[s].sum[i] * exp2(splat(parts[s].most[i] - most))[0];
    const float inverse = total > 0 ? 1 / total : 0;
    const int64_t head = g * p.R + i % p.R, t = q.first + i / p.R;
    T* y = static_cast<T*>(a.y) + ((q.b * a.T + t) * a.H + head) * a.dv;
    for (int64_t j = 0; j < a.dv; j += kW) {
      vf sum = zero();
      for (int64_t s = 0; s < splits; s++)
        sum = load(parts[s].y + i * p.dv_padded + j) * exp2(splat(parts[s].most[i] - most)) + sum;
      store_n(y + j, sum * inverse, min<int64_t>(kW, a.dv - j));
    }
    // a query that sees nothing: exp2(anything - infinity) = 0 in the backward pass
    if (a.lse) a.lse[(q.b * a.H + head) * a.T + t] = total > 0 ? most + __builtin_log2f(total) : __builtin_inff();
  }
}

template <class T>
void attention_forward(const AttentionArgs& a) {
  const KeyTable table = make_table(a, kKeys);
  const Plan p = plan_of<T>(a, table);
  const int64_t rows = p.tokens * p.R, part_floats = rows * (p.dv_padded + 2);
  const int64_t groups = a.B * a.G * p.blocks, units = groups * p.splits;
  const int n_threads = static_cast<int>(min(a.n_threads, units));
  float* shared = p.splits > 1 ? static_cast<float*>(scratch(6, units * part_floats * 4)) : nullptr;
  const auto partial = [&](float* at) { return Partial{at, at + rows, at + 2 * rows}; };
  int64_t next = 0;
  parallel_for(n_threads, [&](int, int) {
    for (;;) {
      // whoever is free takes the next unit, those with most keys first; results do not depend on it
      const int64_t unit = units - 1 - __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (unit < 0) return;
      const int64_t split = unit % p.splits, g = unit / p.splits % a.G, b = unit / p.splits / a.G % a.B;
      const int64_t first = unit / p.splits / a.G / a.B * p.tokens;
      const Queries q = queries_at(a, b, first, min(p.tokens, a.T - first));
      const Partial out = partial(shared ? shared + unit * part_floats : static_cast<float*>(scratch(5, part_floats * 4)));
      forward_unit<T>(a, p, table, q, g, split * p.split_blocks, min(table.n_blocks, (split + 1) * p.split_blocks), out);
      if (p.splits == 1) finish<T>(a, p, q, g, &out, 1);
    }
  });
  if (p.splits == 1) return;
  Partial* parts = static_cast<Partial*>(scratch(0, p.splits * sizeof(Partial)));
  for (int64_t group = 0; group < groups; group++) {  // one query block, so group = b G + g
    for (int64_t s = 0; s < p.splits; s++) parts[s] = partial(shared + (group * p.splits + s) * part_floats);
    const Queries q = queries_at(a, group / a.G, 0, a.T);
    finish<T>(a, p, q, group % a.G, parts, p.splits);
  }
}

// ---- backward

constexpr int kKeysBack = 64;

// All key blocks for one query block and key head: dq, and what it adds to dk and dv. Here scores are transposed, keys
// in rows and queries in lanes, so that p and ds come out as left factors of dv and dk; all products have float32 sums.
template <class T>
void backward_unit(const AttentionArgs& a, const Plan& p, const KeyTable& table, const Queries& q, int64_t g,
                   int64_t part) {
  constexpr bool Pairs = kPairs<T>;
  constexpr int U = kUnit<T>;
  Tiles tiles;
  const int64_t rows = q.count * p.R, keys = kKeysBack;
  const int64_t columns = round_up(rows, kW * U);           // queries as lanes; also whole units
  const int64_t dv_units = ceil_div(a.dv, U), dv_left = round_up(dv_units, kW);
  const int64_t dk_right = round_up(a.dk, kW), dv_right = p.dv_padded;
  // queries and gradients of the output: transposed (right factors of the scores), stacked (of dk and dv)
  float* qt = static_cast<float*>(scratch(0, (p.dk_padded + dv_left) * columns * 4));
  float* gt = qt + p.dk_padded * columns;
  float* qs = static_cast<float*>(scratch(1, columns / U * (dk_right + dv_right) * 4));
  float* gs = qs + columns / U * dk_right;
  float* natural = static_cast<float*>(scratch(2, max(columns, keys) * max(p.dk_padded, dv_left) * 4));
  float* vectors = static_cast<float*>(scratch(3, 4 * columns * 4));
  float *lse = vectors, *delta = lse + columns;
  int32_t *position = reinterpret_cast<int32_t*>(delta + columns), *document = position + columns;
  float* kn = static_cast<float*>(scratch(4, keys * (p.dk_padded + dv_left) * 4));
  float* vn = kn + keys * p.dk_padded;
  // scores and their gradients as floats, as left factors, and stacked; k transposed; dq transposed
  float* st = static_cast<float*>(scratch(5, keys * columns * 5 * 4));
  float *dpt = st + keys * columns, *pt = dpt + keys * columns, *dst = pt + keys * columns, *dss = dst + keys * columns;
  float* kt = static_cast<float*>(scratch(6, dk_right * (keys + columns + kW) * 4));
  float* dqt = kt + dk_right * keys;

  const auto q_row = [&](int64_t i) { return query<T>(a, p, q, g, i); };
  const auto gy_row = [&](int64_t i) {
    return static_cast<const T*>(a.gy) + q.b * a.gy_row + (q.first + i / p.R) * a.gy_step + (g * p.R + i % p.R) * a.dv;
  };
  const int64_t stacked = columns / U;
  __builtin_memset(qs, 0, stacked * (dk_right + dv_right) * 4);
  stack_rows<T>(qs, dk_right, q_row, rows, a.dk);
  stack_rows<T>(gs, dv_right, gy_row, rows, a.dv);
  __builtin_memset(natural, 0, columns * p.dk_padded * 4);
  for (int64_t i = 0; i < rows; i++) units_of_row(natural + i * p.dk_padded, q_row(i), a.dk, p.dk_padded);
  transpose_units(qt, columns, natural, p.dk_padded, columns, p.dk_padded);
  __builtin_memset(natural, 0, columns * dv_left * 4);
  for (int64_t i = 0; i < rows; i++) units_of_row(natural + i * dv_left, gy_row(i), a.dv, dv_left);
  transpose_units(gt, columns, natural, dv_left, columns, dv_left);
  for (int64_t i = 0; i < columns; i++) {
    lse[i] = __builtin_inff(), delta[i] = 0, position[i] = -kEmpty, document[i] = 0;
    if (i >= rows) continue;
    const int64_t head = g * p.R + i % p.R, t = q.first + i / p.R;
    const T *gy = gy_row(i), *y = static_cast<const T*>(a.y) + ((q.b * a.T + t) * a.H + head) * a.dv;
    vf total = zero();
    for (int64_t j = 0; j < a.dv; j += kW) {
      const int64_t n = min<int64_t>(kW, a.dv - j);
      total = load_n(gy + j, n) * load_n(y + j, n) + total;
    }
    lse[i] = a.lse[(q.b * a.H + head) * a.T + t];
    delta[i] = sum(total);
    position[i] = static_cast<int32_t>(a.positions[q.b * a.positions_row + t]);
    document[i] = a.documents ? static_cast<int32_t>(a.documents[q.b * a.T + t]) : 0;
  }
  __builtin_memset(dqt, 0, dk_right * columns * 4);
  const float natural_scale = static_cast<float>(a.scale);
  const vf scale = splat(natural_scale * kLog2e);
  int64_t all_keys = 0;
  for (int64_t i = 0; i < a.n_sources; i++) all_keys += a.sources[i].S;
  const int64_t out = ((part * a.B + q.b) * a.G + g) * all_keys;

  for (int64_t index = 0; index < table.n_blocks; index++) {
    const KeyBlock& block = table.blocks[q.b * table.n_blocks + index];
    const See see = visible(a, q, block);
    if (see == See::kNone) continue;
    const Rule rule = rule_of(a, block);
    const int32_t* positions = table.positions + (q.b * table.n_blocks + index) * keys;
    const int32_t* documents = table.documents + (q.b * table.n_blocks + index) * keys;
    const int64_t n = block.count;
    for (int64_t i = 0; i < n; i++) {
      units_of_row(kn + i * p.dk_padded, key<T>(a, block, q.b, g, i), a.dk, p.dk_padded);
      units_of_row(vn + i * dv_left, value<T>(a, block, q.b, g, i), a.dv, dv_left);
    }
    product<Pairs>(tiles, st, columns, kn, p.dk_padded, qt, columns, n, p.dk_units, columns, false);
    product<Pairs>(tiles, dpt, columns, vn, dv_left, gt, columns, n, dv_units, columns, false);
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < columns; j += kW) {
        vf x = exp2(load(st + i * columns + j) * scale - load(lse + j));
        if (see == See::kSome) {
          const vi mask = may_see(rule, load_int(position + j), splat_int(positions[i]), load_int(document + j),
                                  splat_int(documents[i]));
          x = mask ? x : zero();
        }
        const vf ds = x * (load(dpt + i * columns + j) - load(delta + j)) * natural_scale;
        store_elements<Pairs>(pt + i * stacked, j, x);
        store_elements<Pairs>(dst + i * stacked, j, ds);
      }
    const int64_t first = a.sources[block.source].first + block.first;
    product<Pairs>(tiles, a.dv_out + (out + first) * dv_right, dv_right, pt, stacked, gs, dv_right, n, stacked, dv_right, true);
    product<Pairs>(tiles, a.dk_out + (out + first) * dk_right, dk_right, dst, stacked, qs, dk_right, n, stacked, dk_right, true);
    // dq' (dk, queries) = k' (dk, keys) ds' (keys, queries)
    using Element = typename Select<Pairs, bf16, float>::type;
    stack_rows<Element>(dss, columns, [&](int64_t i) { return reinterpret_cast<const Element*>(dst + i * stacked); }, n, columns);
    const int64_t key_units = ceil_div(n, U);
    for (int64_t c = 0; c < a.dk; c++) {
      Element* to = reinterpret_cast<Element*>(kt + c * keys);
      for (int64_t i = 0; i < n; i++) to[i] = reinterpret_cast<const Element*>(kn + i * p.dk_padded)[c];
      for (int64_t i = n; i < key_units * U; i++) put(to + i, 0);
    }
    product<Pairs>(tiles, dqt, columns, kt, keys, dss, columns, a.dk, key_units, columns, true);
  }
  for (int64_t i = 0; i < rows; i++) {
    T* dq = static_cast<T*>(a.dq) + ((q.b * a.H + g * p.R + i % p.R) * a.T + q.first + i / p.R) * a.dk;
    for (int64_t c = 0; c < a.dk; c++) put(dq + c, dqt[c * columns + i]);
  }
}

template <class T>
void attention_backward(const AttentionArgs& a) {
  const KeyTable table = make_table(a, kKeysBack);
  const Plan p = plan_of<T>(a, table);
  // dk and dv of a (row, key head) are sums over query blocks: `parts` sums are kept apart and added afterwards
  const int64_t units = a.B * a.G * a.parts;
  int64_t next = 0;
  parallel_for(static_cast<int>(min(a.n_threads, units)), [&](int, int) {
    for (;;) {
      const int64_t unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (unit >= units) return;
      const int64_t part = unit % a.parts, g = unit / a.parts % a.G, b = unit / a.parts / a.G;
      for (int64_t block = part; block < p.blocks; block += a.parts) {
        const int64_t first = block * p.tokens;
        backward_unit<T>(a, p, table, queries_at(a, b, first, min(p.tokens, a.T - first)), g, part);
      }
    }
  });
}

}  // namespace
}  // namespace HYMBA_ISA
}  // namespace hymba

using namespace hymba;
using namespace hymba::HYMBA_ISA;

HYMBA_KERNEL(attention_forward)(const AttentionArgs* a) {
  with_type(a->type, [&](auto type) { attention_forward<decltype(type)>(*a); });
}

HYMBA_KERNEL(attention_backward)(const AttentionArgs* a) {
  with_type(a->type, [&](auto type) { attention_backward<decltype(type)>(*a); });
}
