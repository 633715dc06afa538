# SPDX-License-Identifier: Apache-2.0
#
# vLLM's own image with the plugin in it, as it is: nothing of vLLM is moved.
#
#   docker build -t vllm-roco .
#   docker run --gpus all --ipc=host -p 8000:8000 \
#       -v ~/.cache/huggingface:/root/.cache/huggingface vllm-roco MODEL \
#       --additional-config '{"roco": {"budget": 2048, "stride": 256}}'

# one of TESTED_VLLM in vllm_roco/compat.py
ARG VLLM_VERSION=0.33.0

FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY vllm_roco vllm_roco
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM vllm/vllm-openai:v${VLLM_VERSION}
COPY --from=build /wheel /tmp/vllm-roco/
COPY tools/install_wheel.sh /tmp/vllm-roco/
RUN bash /tmp/vllm-roco/install_wheel.sh /tmp/vllm-roco && rm -r /tmp/vllm-roco
# options given after the image's name come behind these
ENTRYPOINT ["vllm", "serve", "--attention-backend", "roco"]
