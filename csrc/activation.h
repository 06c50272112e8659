// The experts' activations by name, for the kernels of every device: no torch here.
#pragma once

namespace moe_ext {

enum class Activation { silu, gelu, gelu_tanh, relu, relu2 };

// How preactivations become activations: phi(g) or, with a gate,
// phi(min(g, limit)) * (clamp(u, -limit, limit) + up_offset).
struct ActivationSpec {
  Activation phi;
  bool gated;
  bool interleaved;  // a row of preactivations is g0 u0 g1 u1 ... instead of g0 g1 ... u0 u1 ...
  double limit;      // infinity: no clamp
  double alpha;      // silu is g * sigmoid(alpha * g)
  double up_offset;
};

}  // namespace moe_ext
