// Stands in for CUDA's runtime. Streams, events, memory and the rules of graph capture are kept; kernels are noted and
// do nothing. What begins with fake_ is for fakegpu.py.
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#undef cudaGetDriverEntryPointByVersion
#undef cudaStreamGetCaptureInfo

#define CUDA extern "C" cudaError_t
#define IGNORED(name, ...) \
  CUDA name(__VA_ARGS__) { return cudaSuccess; }

namespace {

using Names = std::vector<std::string>;
using Memory = std::map<const char*, size_t>;

struct Event {
  bool recorded = false, captured = false;
  unsigned long long capture = 0;  // the one that it was recorded in
  double seconds = 0;
};

struct Gpu {
  std::recursive_mutex mutex;
  std::map<const void*, std::string> kernels;  // names, by the host's functions that launch them
  Memory device_memory, pinned_memory;
  std::set<cudaStream_t> capturing;
  bool capture_active = false;
  unsigned long long capture = 0;  // its number
  cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
  pthread_t capture_thread;
  Names nodes, programs, log, violations;
  bool logging = false;
  std::atomic<int> waits{0}, answer{0}, cooperative{0};
};

// Made by the first call, which comes before this file's own static variables would be there; never unmade.
Gpu& gpu() {
  static Gpu* made = new Gpu;
  return *made;
}

struct Lock {
  std::lock_guard<std::recursive_mutex> guard{gpu().mutex};
};

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error, const char* violation) {
  Lock lock;
  gpu().violations.push_back(violation);
  return last_error = error;
}

bool is_capturing(cudaStream_t stream) { return gpu().capturing.count(stream) > 0; }

bool in_capture_thread() { return gpu().capture_active && pthread_equal(pthread_self(), gpu().capture_thread); }

// Whether a call that a capture may forbid is forbidden now, here.
bool is_forbidden() {
  Lock lock;
  if (!gpu().capture_active || thread_mode == cudaStreamCaptureModeRelaxed) return false;
  if (gpu().capture_mode == cudaStreamCaptureModeRelaxed) return false;
  return in_capture_thread() ||
         (gpu().capture_mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal);
}

#define FORBIDDEN_IN_CAPTURE(name) \
  if (is_forbidden()) return fail(cudaErrorStreamCaptureUnsupported, name)

bool contains(const Memory& memory, const void* pointer) {
  auto next = memory.upper_bound(static_cast<const char*>(pointer));
  if (next == memory.begin()) return false;
  --next;
  return static_cast<const char*>(pointer) < next->first + next->second;
}

char place(const void* pointer) {  // D device, P pinned host memory, H pageable
  if (contains(gpu().device_memory, pointer)) return 'D';
  return contains(gpu().pinned_memory, pointer) ? 'P' : 'H';
}

const char* lines(const Names& names) {
  static std::string text;
  text.clear();
  for (const auto& name : names) {
    int status;
    char* readable = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
    text += readable ? readable : name;
    text += '\n';
    free(readable);
  }
  return text.c_str();
}

int attribute(int number) {
  static const std::map<int, int> of_an_h100 = {{1, 1024},    {2, 1024},      {3, 1024},    {4, 64},  {5, 2147483647},
                                                {6, 65535},   {7, 65535},     {8, 49152},   {10, 32}, {12, 65536},
                                                {16, 132},    {38, 50 << 20}, {39, 2048},   {75, 9},  {76, 0},
                                                {81, 233472}, {82, 65536},    {97, 232448}, {106, 32}};
  auto found = of_an_h100.find(number);
  return found == of_an_h100.end() ? 1 : found->second;
}

}  // namespace

// --- for fakegpu.py ---------------------------------------------------------------------------------------------

// Notes that `name` runs on `stream`, in as many programs (thread blocks) if that is known.
extern "C" void fake_launch_grid(const char* name, cudaStream_t stream, unsigned long programs) {
  Lock lock;
  if (is_capturing(stream)) {
    gpu().nodes.push_back(name);
    gpu().programs.push_back(std::to_string(programs));
  } else if (in_capture_thread())
    gpu().violations.push_back(std::string("not captured: ") + name);
  if (gpu().logging) gpu().log.push_back(name);
}

extern "C" void fake_launch(const char* name, cudaStream_t stream) { fake_launch_grid(name, stream, 0); }

extern "C" void fake_log(int on) {
  Lock lock;
  gpu().logging = on;
  if (on) gpu().log.clear();
}

extern "C" const char* fake_logged() {
  Lock lock;
  return lines(gpu().log);
}

extern "C" const char* fake_nodes() {
  Lock lock;
  return lines(gpu().nodes);
}

extern "C" const char* fake_programs() {
  Lock lock;
  return lines(gpu().programs);
}

extern "C" const char* fake_violations() {
  Lock lock;
  Names violations;
  violations.swap(gpu().violations);
  return lines(violations);
}

// Counts a launch whose programs wait for each other.
extern "C" void fake_cooperative() { gpu().cooperative++; }
extern "C" int fake_cooperative_launches() { return gpu().cooperative; }

extern "C" int fake_waits() { return gpu().waits; }

// The lowest byte of what the host reads of a single number.
extern "C" void fake_answer(int answer) { gpu().answer = answer; }

// --- kernels ----------------------------------------------------------------------------------------------------

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

cudaError_t launch(const void* function, dim3 grid, cudaStream_t stream) {
  Lock lock;
  auto kernel = gpu().kernels.find(function);
  const char* name = kernel == gpu().kernels.end() ? "unknown" : kernel->second.c_str();
  fake_launch_grid(name, stream, 1ul * grid.x * grid.y * grid.z);
  return cudaSuccess;
}

}  // namespace

extern "C" void** __cudaRegisterFatBinary(void*) {
  static void* handle[4];
  return handle;
}
extern "C" void __cudaRegisterFatBinaryEnd(void**) {}
extern "C" void __cudaUnregisterFatBinary(void**) {}
extern "C" char __cudaInitModule(void**) { return 1; }
extern "C" void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
extern "C" void __cudaRegisterFunction(
    void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*
) {
  Lock lock;
  gpu().kernels[function] = name;
}
extern "C" unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
CUDA __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const auto& last = configurations.back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  configurations.pop_back();
  return cudaSuccess;
}
CUDA __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
CUDA __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3, void**, size_t, cudaStream_t stream) {
  return launch(kernel, grid, stream);
}
CUDA cudaLaunchKernel(const void* function, dim3 grid, dim3, void**, size_t, cudaStream_t stream) {
  return launch(function, grid, stream);
}
CUDA cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3, void**, size_t, cudaStream_t stream) {
  return launch(function, grid, stream);
}
CUDA cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* function, void**) {
  return launch(function, configuration->gridDim, configuration->stream);
}
CUDA cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t, void*) {
  fake_launch("host function", stream);
  return cudaSuccess;
}
CUDA cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
IGNORED(cudaFuncSetAttribute, const void*, cudaFuncAttribute, int)
CUDA cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 8;
  return cudaSuccess;
}
CUDA cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 8;
  return cudaSuccess;
}

// --- the device -------------------------------------------------------------------------------------------------

CUDA cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
CUDA cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
CUDA cudaSetDevice(int device) { return device == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice, "cudaSetDevice"); }
CUDA cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
CUDA cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
CUDA cudaGetLastError() {
  auto error = last_error;
  last_error = cudaSuccess;
  return error;
}
CUDA cudaPeekAtLastError() { return last_error; }
extern "C" const char* cudaGetErrorString(cudaError_t error) {
  static thread_local char text[64];
  snprintf(text, sizeof text, "error %d of the pretended GPU", static_cast<int>(error));
  return text;
}
extern "C" const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
CUDA cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  strcpy(properties->name, "pretended NVIDIA H100 80GB HBM3");
  properties->major = 9, properties->minor = 0;
  properties->multiProcessorCount = 132;
  properties->totalGlobalMem = 80ull << 30;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 232448;
  properties->sharedMemPerMultiprocessor = 233472;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->l2CacheSize = 50 << 20;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->memoryBusWidth = 5120;
  properties->textureAlignment = 512;
  return cudaSuccess;
}
CUDA cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = attribute(which);
  return cudaSuccess;
}
CUDA cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}
CUDA cudaDeviceGetPCIBusId(char* id, int size, int) {
  snprintf(id, size, "0000:00:00.0");
  return cudaSuccess;
}
CUDA cudaDeviceCanAccessPeer(int* answer, int, int) {
  *answer = 0;
  return cudaSuccess;
}
IGNORED(cudaDeviceEnablePeerAccess, int, unsigned)
CUDA cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = reinterpret_cast<cudaMemPool_t>(1);
  return cudaSuccess;
}
CUDA cudaDeviceSynchronize() {
  gpu().waits++;
  FORBIDDEN_IN_CAPTURE("cudaDeviceSynchronize");
  return cudaSuccess;
}
IGNORED(cudaProfilerStart)
IGNORED(cudaProfilerStop)

extern "C" int fake_nothing() { return 0; }
CUDA cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result
) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  *function = driver ? dlsym(driver, name) : nullptr;
  if (driver && !*function) *function = dlsym(driver, (std::string(name) + "_v2").c_str());
  if (!*function) *function = reinterpret_cast<void*>(fake_nothing);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
extern "C" cudaError_t cudaGetDriverEntryPoint(
    const char* name, void** function, unsigned long long, cudaDriverEntryPointQueryResult* result
) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, 0, result);
}

// --- memory -----------------------------------------------------------------------------------------------------

CUDA cudaMalloc(void** pointer, size_t size) {
  FORBIDDEN_IN_CAPTURE("cudaMalloc");
  Lock lock;
  *pointer = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*pointer == MAP_FAILED) return fail(cudaErrorMemoryAllocation, "cudaMalloc: out of memory");
  gpu().device_memory[static_cast<char*>(*pointer)] = size;
  return cudaSuccess;
}
CUDA cudaFree(void* pointer) {
  FORBIDDEN_IN_CAPTURE("cudaFree");
  Lock lock;
  auto memory = gpu().device_memory.find(static_cast<char*>(pointer));
  if (memory == gpu().device_memory.end()) return cudaSuccess;
  munmap(pointer, memory->second);
  gpu().device_memory.erase(memory);
  return cudaSuccess;
}
CUDA cudaMallocAsync(void** pointer, size_t size, cudaStream_t) { return cudaMalloc(pointer, size); }
CUDA cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
CUDA cudaHostAlloc(void** pointer, size_t size, unsigned) {
  FORBIDDEN_IN_CAPTURE("cudaHostAlloc");
  Lock lock;
  *pointer = calloc(1, size);
  gpu().pinned_memory[static_cast<char*>(*pointer)] = size;
  return cudaSuccess;
}
CUDA cudaFreeHost(void* pointer) {
  FORBIDDEN_IN_CAPTURE("cudaFreeHost");
  Lock lock;
  gpu().pinned_memory.erase(static_cast<char*>(pointer));
  free(pointer);
  return cudaSuccess;
}
CUDA cudaHostRegister(void* pointer, size_t size, unsigned) {
  Lock lock;
  gpu().pinned_memory[static_cast<char*>(pointer)] = size;
  return cudaSuccess;
}
CUDA cudaHostUnregister(void* pointer) {
  Lock lock;
  gpu().pinned_memory.erase(static_cast<char*>(pointer));
  return cudaSuccess;
}
CUDA cudaMemGetInfo(size_t* free, size_t* total) {
  *free = 79ull << 30, *total = 80ull << 30;
  return cudaSuccess;
}
CUDA cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  Lock lock;
  *attributes = {};
  char where = place(pointer);
  attributes->type = where == 'D'   ? cudaMemoryTypeDevice
                     : where == 'P' ? cudaMemoryTypeHost
                                    : cudaMemoryTypeUnregistered;
  if (where != 'H') attributes->devicePointer = const_cast<void*>(pointer);
  if (where == 'P') attributes->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
CUDA cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  gpu().waits++;
  FORBIDDEN_IN_CAPTURE("cudaMemcpy");
  memcpy(to, from, size);
  return cudaSuccess;
}
CUDA cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  Lock lock;
  const std::string places{place(from), place(to)};
  if (is_capturing(stream) && (places == "HD" || places == "DH"))
    return fail(cudaErrorStreamCaptureUnsupported, "a copy of pageable memory");
  fake_launch(("MEMCPY " + places).c_str(), stream);
  if (places[0] == 'D' && places[1] != 'D' && size <= 8) {  // a number that the host reads
    memset(to, 0, size);
    *static_cast<char*>(to) = static_cast<char>(gpu().answer);
  } else if (size <= 64 << 20) {
    memcpy(to, from, size);
  }
  return cudaSuccess;
}
CUDA cudaMemcpy2DAsync(void*, size_t, const void*, size_t, size_t, size_t, cudaMemcpyKind, cudaStream_t stream) {
  fake_launch("MEMCPY 2D", stream);
  return cudaSuccess;
}
CUDA cudaMemcpyPeerAsync(void*, int, const void*, int, size_t, cudaStream_t stream) {
  fake_launch("MEMCPY peer", stream);
  return cudaSuccess;
}
IGNORED(cudaMemcpyToSymbol, const void*, const void*, size_t, size_t, cudaMemcpyKind)
CUDA cudaMemset(void* pointer, int value, size_t size) {
  FORBIDDEN_IN_CAPTURE("cudaMemset");
  memset(pointer, value, size);
  return cudaSuccess;
}
CUDA cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t stream) {
  fake_launch("MEMSET", stream);
  if (size <= 64 << 20) memset(pointer, value, size);
  return cudaSuccess;
}
CUDA cudaGetSymbolAddress(void** pointer, const void* symbol) {
  *pointer = const_cast<void*>(symbol);
  return cudaSuccess;
}
IGNORED(cudaIpcGetMemHandle, cudaIpcMemHandle_t*, void*)
IGNORED(cudaMemPoolGetAttribute, cudaMemPool_t, cudaMemPoolAttr, void*)
IGNORED(cudaMemPoolSetAttribute, cudaMemPool_t, cudaMemPoolAttr, void*)
IGNORED(cudaMemPoolSetAccess, cudaMemPool_t, const cudaMemAccessDesc*, size_t)
IGNORED(cudaMemPoolTrimTo, cudaMemPool_t, size_t)

// --- streams and events -----------------------------------------------------------------------------------------

CUDA cudaStreamCreate(cudaStream_t* stream) {
  *stream = static_cast<cudaStream_t>(calloc(1, 64));
  return cudaSuccess;
}
CUDA cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return cudaStreamCreate(stream); }
extern "C" cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
IGNORED(cudaStreamDestroy, cudaStream_t)
CUDA cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
CUDA cudaStreamQuery(cudaStream_t stream) {
  if (is_capturing(stream)) return fail(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery of a capturing stream");
  FORBIDDEN_IN_CAPTURE("cudaStreamQuery");
  return cudaSuccess;
}
CUDA cudaStreamSynchronize(cudaStream_t stream) {
  gpu().waits++;
  if (is_capturing(stream))
    return fail(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize of a capturing stream");
  FORBIDDEN_IN_CAPTURE("cudaStreamSynchronize");
  return cudaSuccess;
}
IGNORED(cudaStreamAddCallback, cudaStream_t, cudaStreamCallback_t, void*, unsigned)
CUDA cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
  Lock lock;
  auto* event = reinterpret_cast<Event*>(handle);
  if (!event->recorded) return cudaSuccess;
  if (event->captured && gpu().capture_active && event->capture == gpu().capture) {
    if (!stream) return fail(cudaErrorStreamCaptureImplicit, "the default stream joins a capture");
    gpu().capturing.insert(stream);
    return cudaSuccess;
  }
  if (is_capturing(stream))
    return fail(cudaErrorStreamCaptureIsolation, "a capturing stream waits for an event outside of its capture");
  return cudaSuccess;
}

CUDA cudaEventCreate(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
CUDA cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
IGNORED(cudaEventDestroy, cudaEvent_t)
CUDA cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  Lock lock;
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  *reinterpret_cast<Event*>(handle) = {
      true, is_capturing(stream), gpu().capture, std::chrono::duration<double>(now).count()
  };
  return cudaSuccess;
}
CUDA cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
CUDA cudaEventQuery(cudaEvent_t event) {
  if (reinterpret_cast<Event*>(event)->captured && gpu().capture_active)
    return fail(cudaErrorCapturedEvent, "cudaEventQuery of a captured event");
  FORBIDDEN_IN_CAPTURE("cudaEventQuery");
  return cudaSuccess;
}
CUDA cudaEventSynchronize(cudaEvent_t event) {
  gpu().waits++;
  if (reinterpret_cast<Event*>(event)->captured && gpu().capture_active)
    return fail(cudaErrorCapturedEvent, "cudaEventSynchronize of a captured event");
  FORBIDDEN_IN_CAPTURE("cudaEventSynchronize");
  return cudaSuccess;
}
CUDA cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  double seconds = reinterpret_cast<Event*>(end)->seconds - reinterpret_cast<Event*>(begin)->seconds;
  *ms = seconds > 1e-6 ? 1000 * seconds : 1e-3;
  return cudaSuccess;
}

// --- graphs -----------------------------------------------------------------------------------------------------

CUDA cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  Lock lock;
  if (!stream) return fail(cudaErrorStreamCaptureUnsupported, "capture of the default stream");
  gpu().capture_active = true;
  gpu().capture++;
  gpu().capture_mode = mode;
  gpu().capture_thread = pthread_self();
  gpu().capturing = {stream};
  gpu().nodes.clear();
  gpu().programs.clear();
  return cudaSuccess;
}
CUDA cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  Lock lock;
  gpu().capture_active = false;
  gpu().capturing.clear();
  *graph = reinterpret_cast<cudaGraph_t>(new size_t(gpu().nodes.size()));
  return cudaSuccess;
}
CUDA cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Lock lock;
  *status = is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
CUDA cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* number, cudaGraph_t* graph,
    const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* dependencies
) {
  if (number) *number = gpu().capture;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(1);
  if (dependencies) *dependencies = 0;
  return cudaStreamIsCapturing(stream, status);
}
CUDA cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
CUDA cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}
CUDA cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = *reinterpret_cast<size_t*>(graph);
  return cudaSuccess;
}
CUDA cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
  *count = 0;
  return cudaSuccess;
}
CUDA cudaGraphLaunch(cudaGraphExec_t, cudaStream_t stream) {
  fake_launch("GRAPH", stream);
  return cudaSuccess;
}
IGNORED(cudaGraphDestroy, cudaGraph_t)
IGNORED(cudaGraphExecDestroy, cudaGraphExec_t)
IGNORED(cudaGraphDebugDotPrint, cudaGraph_t, const char*, unsigned)
