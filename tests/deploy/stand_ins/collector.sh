#!/bin/sh
# The entry point of the stand-in for a collector: in Jaeger 1.76 the exporter `otlp_http` has its earlier name.
set -eu
sed s/otlp_http/otlphttp/ /etc/collector.yaml > /tmp/collector.yaml
for argument; do
    shift
    set -- "$@" "$(printf '%s' "$argument" | sed 's/otlp_http/otlphttp/; s,/etc/collector.yaml,/tmp/collector.yaml,')"
done
exec jaeger "$@"
