// outer_square_accumulate on the CPU: a matrix product for each sample whose squares are added to the Fisher straight
// from registers. Compiled once for each instruction set, as loops.h, which includes this.
#pragma once

namespace fiun {
namespace FIUN_ISA {

#if defined(FIUN_AVX512)
constexpr int tile_rows = 8;
#else
constexpr int tile_rows = 4;
#endif
constexpr int vector_lanes = lanes<float>;
constexpr int tile_vectors = 3, tile_columns = tile_vectors * vector_lanes;  // the accumulators fill the registers

// into [rows, tile_columns] += (sum_t left[t][row] panel[t][column])^2
template <int rows>
inline void square_tile(const float* left, int64_t left_step, const float* panel, int64_t positions, float* into,
                        int64_t into_step) {
    Floats sum[rows][tile_vectors];
    for (int i = 0; i < rows; ++i) {
        for (int v = 0; v < tile_vectors; ++v) sum[i][v] = spread(0.0f);
    }
    for (int64_t t = 0; t < positions; ++t) {
        Floats right[tile_vectors];
        for (int v = 0; v < tile_vectors; ++v) right[v] = load(panel + t * tile_columns + v * vector_lanes);
        for (int i = 0; i < rows; ++i) {
            const Floats one = spread(left[t * left_step + i]);
            for (int v = 0; v < tile_vectors; ++v) sum[i][v] = multiply_add(one, right[v], sum[i][v]);
        }
    }
    for (int i = 0; i < rows; ++i) {
        for (int v = 0; v < tile_vectors; ++v) {
            float* to = into + i * into_step + v * vector_lanes;
            store(to, multiply_add(sum[i][v], sum[i][v], load(to)));
        }
    }
}

// Columns [from, from + tile_columns) and rows [first, last) of `into`, over all samples. panel: [positions,
// tile_columns], scratch; it and columns beyond the last are filled with zeros.
inline void outer_square(const OuterSquare& o, int64_t from, int64_t first, int64_t last, float* panel) {
    const int64_t columns = o.k - from < tile_columns ? o.k - from : tile_columns;
    float edge[tile_rows * tile_columns];
    for (int64_t b = 0; b < o.samples; ++b) {
        const float* right = o.right + b * o.right_sample + from;
        for (int64_t t = 0; t < o.positions; ++t) {
            float* to = panel + t * tile_columns;
            for (int64_t c = 0; c < columns; ++c) to[c] = right[t * o.right_step + c];
            for (int64_t c = columns; c < tile_columns; ++c) to[c] = 0;
        }
        for (int64_t m = first; m < last; m += tile_rows) {
            const int rows = int(last - m < tile_rows ? last - m : tile_rows);
            const float* left = o.left + b * o.left_sample + m;
            float* into = o.into + m * o.k + from;
            if (rows == tile_rows && columns == tile_columns) {
                square_tile<tile_rows>(left, o.left_step, panel, o.positions, into, o.k);
                continue;
            }
            memset(edge, 0, sizeof(edge));
            if (rows == tile_rows) {
                square_tile<tile_rows>(left, o.left_step, panel, o.positions, edge, tile_columns);
            } else {
                for (int i = 0; i < rows; ++i) {
                    square_tile<1>(left + i, o.left_step, panel, o.positions, edge + i * tile_columns, tile_columns);
                }
            }
            for (int i = 0; i < rows; ++i) {
                for (int64_t c = 0; c < columns; ++c) into[i * o.k + c] += edge[i * tile_columns + c];
            }
        }
    }
}

// into [n] += sum over r of products[r] [n] squared; the rows lie `stride` elements apart.
template <class F>
void add_squares(void* into, const void* products, int64_t rows, int64_t stride, int64_t n) {
    constexpr int64_t block = 1024;  // of `into` stays in the first-level cache while row after row is added
    for (int64_t at = 0; at < n; at += block) {
        const int64_t m = n - at < block ? n - at : block;
        F* FIUN_RESTRICT sum = static_cast<F*>(into) + at;
        for (int64_t r = 0; r < rows; ++r) {
            const F* FIUN_RESTRICT product = static_cast<const F*>(products) + r * stride + at;
            for (int64_t i = 0; i < m; ++i) sum[i] = accumulated(sum[i], product[i], true);
        }
    }
}

}  // namespace FIUN_ISA
}  // namespace fiun
