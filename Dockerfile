# docker build -t fastresnet .
# docker run --gpus all -v fastresnet-data:/data -v fastresnet-runs:/runs fastresnet train
FROM python:3.12-slim-bookworm

# torch.compile builds kernels at run time: Triton needs a C compiler, and the CPU back end a C++ one.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/fastresnet
COPY pyproject.toml README.md LICENSE ./
COPY fastresnet fastresnet
COPY pipelines pipelines
COPY benchmarks benchmarks
RUN pip install --no-cache-dir '.[dali,tensorboard]'

RUN useradd --create-home fastresnet && install -d -o fastresnet -g fastresnet /data /runs
USER fastresnet
WORKDIR /home/fastresnet

ENV FASTRESNET_DATA=/data \
    FASTRESNET_RUNS=/runs \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/data", "/runs"]
ENTRYPOINT ["fastresnet"]
CMD ["train"]
