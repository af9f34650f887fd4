# minisd on the CPU:  docker build -t minisd .  &&  docker run --rm -v "$PWD:/work" minisd generate "a fox in the snow"
# The page:  docker run --rm -p 127.0.0.1:7860:7860 minisd serve --host 0.0.0.0
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY minisd ./minisd
# torch's build for the CPU first: that of PyPI brings several gigabytes of CUDA libraries
RUN pip install -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu \
 && pip install -c constraints.txt ".[web]"

RUN useradd --uid 1000 --create-home minisd && mkdir /work && chown minisd /work
USER 1000
WORKDIR /work
EXPOSE 7860
ENTRYPOINT ["minisd"]
CMD ["--help"]
