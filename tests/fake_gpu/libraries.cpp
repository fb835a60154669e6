// Stands in for cuBLAS and for cuDNN's batch norm: calls are noted, nothing is computed.
#include <cstddef>
#include <cstdlib>
#include <cstring>

extern "C" void fake_launch(const char* name, void* stream);

namespace {

thread_local void *cublas_stream = nullptr, *cudnn_stream = nullptr;

int create(void** made) {  // a handle or a descriptor, never inspected
  *made = calloc(1, 64);
  return 0;
}

}  // namespace

#define IGNORED(name) \
  int name() { return 0; }
#define CREATED(name) \
  int name(void** made) { return create(made); }
#define NOTED(name, stream)     \
  int name() {                  \
    fake_launch(#name, stream); \
    return 0;                   \
  }

extern "C" {
CREATED(cublasCreate_v2)
IGNORED(cublasDestroy_v2)
IGNORED(cublasSetWorkspace_v2)
IGNORED(cublasSetMathMode)
IGNORED(cublasSetPointerMode_v2)
int cublasSetStream_v2(void*, void* stream) {
  cublas_stream = stream;
  return 0;
}
int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
NOTED(cublasSgemm_v2, cublas_stream)
NOTED(cublasGemmEx, cublas_stream)
NOTED(cublasSgemmEx, cublas_stream)
NOTED(cublasGemmStridedBatchedEx, cublas_stream)
NOTED(cublasSgemmStridedBatched, cublas_stream)
NOTED(cublasDgemm_v2, cublas_stream)
NOTED(cublasDgemmStridedBatched, cublas_stream)
NOTED(cublasSgemv_v2, cublas_stream)
NOTED(cublasSdot_v2, cublas_stream)

size_t cublasLtGetVersion() { return 130101; }
CREATED(cublasLtMatmulDescCreate)
IGNORED(cublasLtMatmulDescDestroy)
IGNORED(cublasLtMatmulDescSetAttribute)
CREATED(cublasLtMatmulPreferenceCreate)
IGNORED(cublasLtMatmulPreferenceDestroy)
IGNORED(cublasLtMatmulPreferenceSetAttribute)
CREATED(cublasLtMatrixLayoutCreate)
IGNORED(cublasLtMatrixLayoutDestroy)
IGNORED(cublasLtMatrixLayoutSetAttribute)
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* found, int* count) {
  *count = 1;
  memset(found, 0, 64);
  return 0;
}
int cublasLtMatmul(
    void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
    const void*, void*, size_t, void* stream
) {
  fake_launch("cublasLtMatmul", stream);
  return 0;
}

CREATED(cudnnCreate)
int cudnnSetStream(void*, void* stream) {
  cudnn_stream = stream;
  return 0;
}
int cudnnGetStream(void*, void** stream) {
  *stream = cudnn_stream;
  return 0;
}
size_t cudnnGetVersion() { return 91900; }
size_t cudnnGetCudartVersion() { return 13000; }
const char* cudnnGetErrorString(int) { return "an error of the pretended cuDNN"; }
CREATED(cudnnCreateTensorDescriptor)
CREATED(cudnnCreateFilterDescriptor)
CREATED(cudnnCreateConvolutionDescriptor)
CREATED(cudnnCreateActivationDescriptor)
IGNORED(cudnnDestroyTensorDescriptor)
IGNORED(cudnnDestroyFilterDescriptor)
IGNORED(cudnnDestroyConvolutionDescriptor)
IGNORED(cudnnDestroyActivationDescriptor)
IGNORED(cudnnSetTensorNdDescriptor)
IGNORED(cudnnSetFilterNdDescriptor)
IGNORED(cudnnSetActivationDescriptor)
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*, size_t* size) {
  *size = 1024;
  return 0;
}
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    void*, int, int, void*, void*, void*, void*, void*, size_t* size
) {
  *size = 1024;
  return 0;
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    void*, int, int, void*, void*, void*, void*, void*, void*, void*, size_t* size
) {
  *size = 1024;
  return 0;
}
NOTED(cudnnBatchNormalizationForwardTrainingEx, cudnn_stream)
NOTED(cudnnBatchNormalizationBackwardEx, cudnn_stream)
NOTED(cudnnBatchNormalizationForwardInference, cudnn_stream)
}
