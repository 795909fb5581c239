# NOT BUILT HERE: written from sglang 0.5.23's own requirements, never built or run by this project, which is tested
# without GPUs. Expect to adapt the base image to your driver.
#   docker build -f docker/rollout.Dockerfile -t sglang-rollout .
#   docker run --gpus all --network host --shm-size 32g -v /models:/models sglang-rollout \
#     --model-path /models/MODEL --load-format dummy --host 127.0.0.1 --port 30000
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev build-essential libnuma1 \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/sglang
COPY requirements-rollout-gpu.txt /tmp/
RUN /opt/sglang/bin/pip install --no-cache-dir -r /tmp/requirements-rollout-gpu.txt

ENV PATH=/opt/sglang/bin:$PATH
ENTRYPOINT ["python", "-m", "sglang.launch_server"]
