// What the LEEP kernels take and give; see ops/leep_statistics.h, ops/transferability_map.h and ops/risk_map.h. Every
// pointer is to device memory. Launch functions do not wait for the device.
//
// What the CPU ops raise an error for turns results into NaN here, since an error would have to wait for the device:
// the map at a voxel whose label is neither a class nor ignore_index, the whole table of statistics for one such voxel,
// and the whole map where P(y|z) holds something else than probabilities.
#pragma once

#include <cuda_runtime.h>

#include "cuda/types.h"
#include "math/risk_map.h"

namespace riskmap::cuda {

// Logits of the source model: of Z classes, or of R overlapping regions that make up Z labels. The Z logits of a voxel
// are then the sums of the logits of the regions that a label is in.
struct SourceInputs {
  Volume source;           // [B, Z, S] or [B, R, S]
  const uint8_t* regions;  // [R, Z], 1 where the label is in the region; nullptr: softmax source
  int64_t classes;         // Z
  VoxelMap target;         // [B, S]
  LabelCode label;
  int64_t num_classes;  // C
};

// How the logits are read: few classes in a thread, many in several warps, or any from memory.
enum class SourceWay : int { kFew, kMany, kAny };

struct StatisticsPlan {
  SourceWay way;
  Chunking chunking;  // a table of C * Z numbers for each chunk
};

StatisticsPlan plan_statistics(const SourceInputs& in);

struct Statistics {
  SourceInputs in;
  StatisticsPlan plan;
  double* partial;      // [chunks, C, Z]
  uint8_t* touched;     // [chunks, C], whether a row of a table was written
  int32_t* bad_labels;  // [chunks]
  double* joint;        // [C, Z]
};

void launch_statistics(const Statistics& args, cudaStream_t stream);

enum class MapKind : int {
  kTransferability,  // T, and 0 where the voxel is ignored
  kMarked,           // T, and kIgnoredMark where the voxel is ignored, with partial sums for finish_risk_map
  kRisk              // the weight
};

inline constexpr float kIgnoredMark = 1.0f;  // no transferability is above 0

// P(y|z) in the precision of the sums; NaN throughout where any of it is no probability.
struct ConditionalTable {
  const void* values;  // [C, Z] of dtype, contiguous
  Dtype dtype;
  int64_t count;
  bool to_double;
  void* table;  // acc_t[C, Z]
};

// Whether the kernels check and convert P(y|z) themselves.
bool has_small_table(const SourceInputs& in);

struct Transfer {
  SourceInputs in;
  ConditionalTable conditional;  // its table made already, unless it is small
  int64_t background;            // -1: every valid voxel is foreground
  Chunking chunking;
  MapKind kind;
  math::RiskCurve curve;  // of kRisk
  float* out;             // [B, S]
  double* partial;        // [B, 3, chunks] with kMarked: smallest and largest hardness, number of foreground voxels
};

Chunking transfer_chunking(const SourceInputs& in);

// Turns a marked map into weights with the range of each image.
struct FinishRiskMap {
  int64_t batch, voxels, chunks_per_image;
  const double* partial;
  math::Scheme scheme;
  double log_base, alpha, scale;
  float* map;
};

void make_conditional_table(const ConditionalTable& args, cudaStream_t stream);
void launch_transfer(const Transfer& args, cudaStream_t stream);
void launch_finish_risk_map(const FinishRiskMap& args, cudaStream_t stream);

}  // namespace riskmap::cuda
