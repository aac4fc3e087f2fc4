# Stand-ins for the images of the profile `observability` of deploy/compose.yaml where no registry of images is reached.
# Each runs as the user that the image has. There is none for Grafana.
ARG PYTHON_IMAGE

# For prom/prometheus: Debian's.
FROM ${PYTHON_IMAGE} AS prometheus
RUN apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends prometheus \
 && mkdir --parents /prometheus && chown 65534 /prometheus
USER 65534
WORKDIR /prometheus
ENTRYPOINT ["prometheus"]

# For jaegertracing/jaeger: the program that this machine has on its PATH.
FROM ${PYTHON_IMAGE} AS jaeger
COPY jaeger /usr/bin/jaeger
USER 10001
ENTRYPOINT ["jaeger"]

# For otel/opentelemetry-collector-contrib: Jaeger 2 is a collector with the parts that collector.yaml names.
FROM jaeger AS collector
COPY tests/deploy/stand_ins/collector.sh /usr/bin/collector
ENTRYPOINT ["sh", "/usr/bin/collector"]
