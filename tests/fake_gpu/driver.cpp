// Stands in for CUDA's driver, as far as Triton and PyTorch ask it.
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <map>

using Result = int;
using Handle = void*;

extern "C" void fake_cooperative();
extern "C" void fake_launch_grid(const char* name, void* stream, unsigned long programs);

namespace {

int attribute(int number) {
  static const std::map<int, int> of_an_h100 = {{1, 1024}, {8, 49152},    {10, 32},     {12, 65536},    {13, 1980000},
                                                {16, 132}, {36, 2619000}, {37, 5120},   {38, 50 << 20}, {39, 2048},
                                                {75, 9},   {76, 0},       {81, 233472}, {82, 65536},    {97, 232448}};
  auto found = of_an_h100.find(number);
  return found == of_an_h100.end() ? 1 : found->second;
}

struct LaunchAttribute {
  unsigned id;
  char padding[4], value[64];
};
struct LaunchConfiguration {
  unsigned grid[3], block[3], shared;
  Handle stream;
  const LaunchAttribute* attributes;
  unsigned attribute_count;
};

const unsigned COOPERATIVE = 2;       // programs that wait for each other
const Result COOPERATIVE_LAUNCH_TOO_LARGE = 720;

template <typename Value>
Result give(Value* place, Value value) {
  *place = value;
  return 0;
}

Result launch(Handle function, Handle stream, unsigned long programs) {
  fake_launch_grid(static_cast<const char*>(function), stream, programs);
  return 0;
}

const Handle SOMETHING = reinterpret_cast<Handle>(1);

}  // namespace

extern "C" {
Result cuInit(unsigned) { return 0; }
Result cuDriverGetVersion(int* version) { return give(version, 13000); }
Result cuDeviceGetCount(int* count) { return give(count, 1); }
Result cuDeviceGet(int* device, int) { return give(device, 0); }
Result cuDeviceGetName(char* name, int size, int) { return snprintf(name, size, "pretended NVIDIA H100") < 0; }
Result cuDeviceGetAttribute(int* value, int number, int) { return give(value, attribute(number)); }
Result cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  return give(active, 1);
}
Result cuDevicePrimaryCtxRetain(Handle* context, int) { return give(context, SOMETHING); }
Result cuCtxGetCurrent(Handle* context) { return give(context, SOMETHING); }
Result cuCtxSetCurrent(Handle) { return 0; }
Result cuCtxGetDevice(int* device) { return give(device, 0); }
Result cuCtxGetLimit(size_t* limit, int) { return give(limit, size_t{1} << 20); }
Result cuCtxSetLimit(int, size_t) { return 0; }
Result cuGetErrorString(int, const char** text) { return give(text, "an error of the pretended GPU"); }
Result cuGetErrorName(int, const char** text) { return give(text, "PRETENDED"); }

Result cuModuleLoad(Handle* module, const char*) { return give(module, SOMETHING); }
Result cuModuleLoadData(Handle* module, const void*) { return give(module, SOMETHING); }
Result cuModuleLoadDataEx(Handle* module, const void*, unsigned, Handle, Handle) { return give(module, SOMETHING); }
Result cuModuleUnload(Handle) { return 0; }
Result cuModuleGetFunction(Handle* function, Handle, const char* name) {  // a function is its name
  return give(function, static_cast<Handle>(strdup(name)));
}
Result cuFuncGetAttribute(int* value, int number, Handle) {
  return give(value, number == 0 ? 1024 : number == 4 ? 32 : 0);  // threads a block, registers
}
Result cuFuncSetAttribute(Handle, int, int) { return 0; }
Result cuFuncSetCacheConfig(Handle, int) { return 0; }
Result cuOccupancyMaxActiveClusters(int* count, Handle, Handle) { return give(count, 8); }
Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Handle, int, size_t) { return give(count, 8); }
Result cuPointerGetAttribute(Handle data, int number, unsigned long long pointer) {
  if (number == 2) return give(static_cast<unsigned*>(data), 2u);  // memory of the device
  return give(static_cast<unsigned long long*>(data), number == 3 ? pointer : 0ull);
}

Result cuLaunchKernel(
    Handle function, unsigned x, unsigned y, unsigned z, unsigned, unsigned, unsigned, unsigned, Handle stream, Handle*,
    Handle*
) {
  return launch(function, stream, 1ul * x * y * z);
}
Result cuLaunchKernelEx(const LaunchConfiguration* configuration, Handle function, Handle*, Handle*) {
  const unsigned* grid = configuration->grid;
  const unsigned long programs = 1ul * grid[0] * grid[1] * grid[2];
  for (unsigned i = 0; i < configuration->attribute_count; i++) {
    const LaunchAttribute& attribute = configuration->attributes[i];
    if (attribute.id == COOPERATIVE && *reinterpret_cast<const int*>(attribute.value)) {
      if (programs > 132) return COOPERATIVE_LAUNCH_TOO_LARGE;  // on each multiprocessor of an H100 one
      fake_cooperative();
    }
  }
  return launch(function, configuration->stream, programs);
}
Result cuLaunchCooperativeKernel(
    Handle function, unsigned x, unsigned y, unsigned z, unsigned, unsigned, unsigned, unsigned, Handle stream, Handle*
) {
  return launch(function, stream, 1ul * x * y * z);
}

Result cuTensorMapEncodeTiled() { return 0; }
Result cuLinkCreate_v2() { return 0; }
Result cuLinkAddData_v2() { return 0; }
Result cuLinkComplete() { return 0; }
}
