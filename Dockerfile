# NOT BUILT where this was written: there was no network and no container tool. Nothing here has been run.
#
#   docker build -t fgvc .
#   docker run --rm --user "$(id -u)" -v "$PWD:/work" fgvc predict RUN bird.jpg
#   docker run --rm --user "$(id -u)" -v "$PWD:/work" --network host fgvc app RUN
#
# The page of `fgvc app` listens on 127.0.0.1 alone, hence the network of the host (Linux).
FROM python:3.12-slim

RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir '.[app,demo]'

# what libraries cache, for any user; what fetched weights need is fetched again by each container
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["fgvc"]
CMD ["--help"]
