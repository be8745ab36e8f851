// What the operations of convolutions share where shapes are known: their
// attributes, and the sizes of what they return.
#ifndef RIGL_KERAS_CONVOLUTION_SHAPES_H_
#define RIGL_KERAS_CONVOLUTION_SHAPES_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "plans.h"
#include "runtime.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace rigl_keras {
namespace {

// How many groups a kernel of some channels splits images of more into.
inline tensorflow::Status GroupsOf(int64_t of_images, int64_t of_kernel,
                                   int64_t filters, int64_t* groups) {
  *groups = of_kernel ? std::max<int64_t>(1, of_images / of_kernel) : 1;
  if (*groups * of_kernel != of_images)
    return InvalidArgument("the kernel takes ", of_kernel,
                           " channels and the images have ", of_images);
  if (filters % *groups)
    return InvalidArgument(filters, " filters are not ", *groups,
                           " groups of as many");
  return tensorflow::OkStatus();
}

// What the attributes of all convolutions say, and what follows from shapes.
struct Attributes {
  std::vector<int32_t> strides, dilations;
  std::vector<int32_t> pads = {0, 0, 0, 0};  // above, below, left, right
  std::string padding;

  // From a kernel's construction or a shape function. `padded`: of an
  // operation that has pads.
  template <typename Context>
  tensorflow::Status Get(Context* context, bool padded = false) {
    TF_RETURN_IF_ERROR(context->GetAttr("strides", &strides));
    TF_RETURN_IF_ERROR(context->GetAttr("dilations", &dilations));
    TF_RETURN_IF_ERROR(context->GetAttr("padding", &padding));
    for (const auto& given : {strides, dilations})
      if (given.size() != 4 || given[0] != 1 || given[3] != 1 ||
          given[1] < 1 || given[2] < 1)
        return InvalidArgument("strides and dilations must be [1, rows, "
                               "columns, 1], positive.");
    if (padding != "SAME" && padding != "VALID")
      return InvalidArgument("padding must be SAME or VALID. Received: ",
                             padding);
    if (!padded) return tensorflow::OkStatus();
    pads.clear();  // what is read is appended
    TF_RETURN_IF_ERROR(context->GetAttr("pads", &pads));
    constexpr int32_t kMostPad = 1 << 24;
    if (pads.size() != 4 ||
        *std::min_element(pads.begin(), pads.end()) < 0 ||
        *std::max_element(pads.begin(), pads.end()) > kMostPad ||
        (padding != "VALID" && pads != std::vector<int32_t>{0, 0, 0, 0}))
      return InvalidArgument("pads are four numbers from 0 to ", kMostPad,
                             ", with padding VALID.");
    return tensorflow::OkStatus();
  }

  // Rows (axis 0) or columns (1) of the output. `known`: before anything is
  // computed, where TensorFlow refuses what it computes an empty output of.
  tensorflow::Status Output(int axis, int64_t length, int64_t kernel,
                            bool known, int64_t* output) const {
    const int64_t stride = strides[axis + 1];
    const int64_t padded = length + pads[2 * axis] + pads[2 * axis + 1];
    const int64_t extent = (kernel - 1) * dilations[axis + 1] + 1;
    *output = padding == "SAME" ? CeilDivide(padded, stride)
                                : (padded - extent + stride) / stride;
    if (*output < 0 || (known && padding != "SAME" && padded < extent))
      return InvalidArgument("images must not be smaller than the kernel, with "
                             "padding VALID. Received: ",
                             padded, " pixels and a kernel of ", extent);
    return tensorflow::OkStatus();
  }
};

namespace shapes = tensorflow::shape_inference;

using shapes::DimensionHandle;
using shapes::InferenceContext;
using shapes::ShapeHandle;

// Sets an output that is of a known size only if a tensor can have it.
inline tensorflow::Status SetOutput(InferenceContext* context, int output,
                                    ShapeHandle shape) {
  if (context->FullyDefined(shape)) {
    std::vector<int64_t> sizes;
    for (int a = 0; a < context->Rank(shape); ++a)
      sizes.push_back(context->Value(context->Dim(shape, a)));
    TensorShape any;
    TF_RETURN_IF_ERROR(tensorflow::TensorShapeUtils::MakeShape(sizes, &any));
  }
  context->set_output(output, shape);
  return tensorflow::OkStatus();
}

// The outputs of images, as kernels of operations compute them; what these
// would refuse is refused.
inline tensorflow::Status OutputOf(InferenceContext* context,
                                   const Attributes& attributes,
                                   ShapeHandle images, ShapeHandle kernel,
                                   ShapeHandle* outputs) {
  ShapeHandle x;
  TF_RETURN_IF_ERROR(context->WithRank(images, 4, &x));
  TF_RETURN_IF_ERROR(context->WithRank(kernel, 4, &kernel));
  const DimensionHandle of_images = context->Dim(x, 3),
                        of_kernel = context->Dim(kernel, 2),
                        filters = context->Dim(kernel, 3);
  int64_t groups;
  if (context->ValueKnown(of_images) && context->ValueKnown(of_kernel))
    TF_RETURN_IF_ERROR(GroupsOf(
        context->Value(of_images), context->Value(of_kernel),
        context->ValueKnown(filters) ? context->Value(filters) : 0, &groups));
  DimensionHandle sizes[2];
  for (int a = 0; a < 2; ++a) {
    const DimensionHandle length = context->Dim(x, a + 1);
    const DimensionHandle positions = context->Dim(kernel, a);
    sizes[a] = context->UnknownDim();
    if (context->ValueKnown(positions) && context->Value(positions) < 1)
      return InvalidArgument("a kernel must have rows and columns.");
    if (!context->ValueKnown(length) || !context->ValueKnown(positions))
      continue;
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    if (context->Value(length) > kMost || context->Value(positions) > kMost)
      return InvalidArgument("sizes must be below 2^31.");
    int64_t output;
    TF_RETURN_IF_ERROR(attributes.Output(a, context->Value(length),
                                         context->Value(positions), true,
                                         &output));
    sizes[a] = context->MakeDim(output);
  }
  *outputs = context->MakeShape(
      {context->Dim(x, 0), sizes[0], sizes[1], filters});
  return tensorflow::OkStatus();
}

}  // namespace
}  // namespace rigl_keras

#endif  // RIGL_KERAS_CONVOLUTION_SHAPES_H_
