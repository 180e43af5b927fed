// One token for every row of a batch, through the whole model, in one call. See decode.cpp.
//
// The structs are filled by Python (hymba/engine/native.py) as rows of 8-byte fields, in this order. Strides count
// elements. "Floats" are float32 copies of small parameters; matrices and the cache are the model's own memory.
#pragma once

#include "matvec.h"

namespace hymba {

struct LayerArgs {
  Matrix in_proj, x_proj, dt_proj, out_proj, gate_proj, up_proj, down_proj;  // gate_proj.data null: relu2 without gate
  const float* heads_norm;                                                     // (D,)
  const float *q_norm, *k_norm;                                                // (H, dk), (G, dk) or null
  const float *conv_weight, *conv_bias;                                        // (K, E), (E,)
  const float *dt_norm, *B_norm, *C_norm, *dt_bias;                            // (rank,), (N,), (N,), (E,)
  const float *A, *D;                                                          // (E, N) log2(e) times A, (E,)
  const float *attn_norm, *ssm_norm, *mlp_norm;                                // (E,), (E,), (D,)
  int64_t producer;                                                            // the layer whose keys are read
  int64_t window;                                                              // tokens before the query; -1: all
};

struct ModelArgs {
  int64_t dtype;  // DType of activations and cache
  int64_t vocabulary, D, E, H, G, dk, dv, F, N, K, rank, n_meta, n_layers;
  double norm_eps, qk_norm_eps;
  Matrix embedding, lm_head;
  const float* norm;         // (D,)
  const float *cos, *sin;    // (positions, dk / 2); null: no rotation
  const LayerArgs* layers;
  int64_t max_batch;
};

// Keys and values of one producing layer. With scales they are int8, and the meta tokens' still of the model's type.
struct StoreArgs {
  void *k, *v;                  // (B, G, slots, dk), (B, G, slots, dv); token i of a row lies in slot i % slots
  int64_t k_row, v_row, slots;  // elements from row to row
  float *k_scale, *v_scale;     // (B, G, slots) or null
  int64_t scale_row;
  const void *meta_k, *meta_v;  // (G, M, dk), (G, M, dv), shared by all rows
  int64_t meta_k_head, meta_k_key, meta_v_head, meta_v_key;
};

struct CacheArgs {
  const StoreArgs* stores;  // one per layer, unused in a layer that reads another's
  void* conv;               // (L, B, K - 1, E), newest last
  int64_t conv_layer, conv_row;
  float* ssm;  // (L, B, E, N)
  int64_t ssm_layer, ssm_row;
};

struct StepArgs {
  const ModelArgs* model;
  const CacheArgs* cache;
  const int64_t* ids;      // (B,)
  const int64_t* lengths;  // (B,) text tokens of each row before this one
  int64_t batch;
  float* logits;  // (B, V); null: not wanted
  void* workspace;
  int64_t n_threads;
};

// What `decode_workspace` answers: bytes of `workspace`.
struct WorkspaceArgs {
  const ModelArgs* model;
  int64_t n_threads;
  int64_t* bytes;
};

}  // namespace hymba
