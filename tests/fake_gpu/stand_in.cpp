// torch built for CPUs lets tensors that claim to be on "cuda" through autograd's engine, which asks
// for the accelerator, its streams and its current device: there is one, and it does nothing.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <optional>

namespace at::accelerator {
// Found before torch's own of this name, because this library is loaded first.
std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
}  // namespace at::accelerator

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

namespace {
using c10::Device;
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(type(), 0); }
  c10::Stream getStream(Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
};
const c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard);
}  // namespace
