{{/*
What the schema of the values cannot say. Each failure is one sentence that names the value.
*/}}
{{- define "mercato.check" -}}
{{- include "mercato.checkServers" . }}
{{- include "mercato.checkEncryption" . }}
{{- include "mercato.checkAuthorities" . }}
{{- include "mercato.checkObservability" . }}
{{- include "mercato.checkServices" . }}
{{- include "mercato.checkClients" . }}
{{- end }}

{{- define "mercato.checkServers" -}}
{{- $onServer := dict }}
{{- $names := list }}
{{- $secrets := list }}
{{- range $server := include "mercato.servers" . | fromJsonArray }}
{{- if has $server.name $names }}
{{- fail (printf "databases.servers: two servers have the name %s." $server.name) }}
{{- end }}
{{- if and (has $server.adminSecret $secrets) (not $.Values.databases.cloudNativePG.enabled) }}
{{- fail (printf "databases.servers: two servers have the adminSecret %s, and so the same DSN: give each its own." $server.adminSecret) }}
{{- end }}
{{- $names = append $names $server.name }}
{{- $secrets = append $secrets $server.adminSecret }}
{{- range $service := $server.services }}
{{- with get $onServer $service }}
{{- fail (printf "databases.servers: the service %s is on two servers, %s and %s: each service is on exactly one." $service . $server.name) }}
{{- end }}
{{- $_ := set $onServer $service $server.name }}
{{- end }}
{{- end }}
{{- range include "mercato.services" . | fromJsonArray }}
{{- if not (hasKey $onServer .) }}
{{- fail (printf "databases.servers: the service %s is on no server: each service is on exactly one." .) }}
{{- end }}
{{- end }}
{{- with .Values.databases.cloudNativePG }}
{{- if and .enabled (ge (int .synchronousReplicas) (int .instances)) }}
{{- fail (printf "databases.cloudNativePG: %d synchronousReplicas need more than %d instances: one of these is the primary." (int .synchronousReplicas) (int .instances)) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "mercato.checkEncryption" -}}
{{- if .Values.tls.enabled }}
{{- if and (eq .Values.transport "nats") (hasPrefix "nats://" .Values.nats.url) }}
{{- fail (printf "tls.enabled: nats.url is %s, which is not encrypted: write tls://HOST:PORT." .Values.nats.url) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "mercato.checkObservability" -}}
{{- if and .Values.metrics.serviceMonitor.enabled (not .Values.metrics.tokenSecret.name) }}
{{- fail "metrics.serviceMonitor.enabled: Prometheus needs a token to read /metrics: name its Secret in metrics.tokenSecret.name." }}
{{- end }}
{{- if .Values.networkPolicy.enabled }}
{{- if and .Values.tracing.endpoint (not .Values.networkPolicy.otlp) }}
{{- fail "tracing.endpoint: the pods may not reach it: name the collector and its port in networkPolicy.otlp." }}
{{- end }}
{{- if and .Values.mail.secret.name (not .Values.networkPolicy.mail) }}
{{- fail "mail.secret.name: the pods of users may not reach the mail server: name it and its port in networkPolicy.mail." }}
{{- end }}
{{- end }}
{{- if and .Values.mail.secret.name (not .Values.mail.shopAddress) }}
{{- fail "mail.shopAddress is empty: the links in letters need the public address of the shop." }}
{{- end }}
{{- end }}

{{- define "mercato.checkServices" -}}
{{- range $name := include "mercato.serving" . | fromJsonArray }}
{{- $config := include "mercato.config" (dict "root" $ "component" $name) | fromJson }}
{{- with $config.autoscaling }}
{{- if .enabled }}
{{- if gt (int .minReplicas) (int .maxReplicas) }}
{{- fail (printf "services.%s.autoscaling: minReplicas (%d) is more than maxReplicas (%d)." $name (int .minReplicas) (int .maxReplicas)) }}
{{- end }}
{{- if not (dig "requests" "cpu" "" $config.resources) }}
{{- fail (printf "services.%s.autoscaling: cpuPercent is a share of resources.requests.cpu, which is not set." $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- if and (ne .Values.transport "nats") (not .Values.services.sandbox.enabled) }}
{{- fail (printf "services.sandbox.enabled: with transport %s payments finds the sandbox in this release alone: leave it on." .Values.transport) }}
{{- end }}
{{- end }}

{{- define "mercato.checkClients" -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
{{- fail "ingress.hosts is empty: name the hosts of the shop." }}
{{- end }}
{{- range $name := list "httpRoute" "grpcRoute" }}
{{- $route := get $.Values $name }}
{{- if and $route.enabled (not $route.parentRefs) }}
{{- fail (printf "%s.parentRefs is empty: name the Gateway that the route belongs to." $name) }}
{{- end }}
{{- end }}
{{- if and .Values.grpcRoute.enabled (not .Values.grpc.enabled) }}
{{- fail "grpcRoute.enabled: the gateway has no port for gRPC: set grpc.enabled." }}
{{- end }}
{{- end }}
