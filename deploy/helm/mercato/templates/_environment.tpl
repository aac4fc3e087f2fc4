{{/*
The variables of the processes. A process takes its credentials from its own Secret; here is what is in the values.
*/}}

{{/* Whether other processes connect to this one: those of a transport without a broker. Empty: no. */}}
{{- define "mercato.isCalled" -}}
{{- if and (ne .root.Values.transport "nats") (ne .component "gateway") }}yes{{ end }}
{{- end }}

{{/* "yes" for a component that answers the API over gRPC. */}}
{{- define "mercato.hasGrpc" -}}
{{- if and (eq .component "gateway") .root.Values.grpc.enabled }}yes{{ end }}
{{- end }}

{{/* The addresses of the services that a process calls directly. */}}
{{- define "mercato.addresses" -}}
{{- $addresses := list }}
{{- range index (include "mercato.calls" . | fromJson) .component }}
{{- $addresses = append $addresses (printf "%s=%s-%s-rpc:9080" . (include "mercato.fullname" $.root) .) }}
{{- end }}
{{- join "; " $addresses }}
{{- end }}

{{- define "mercato.variable" -}}
{{- toJson (dict "name" .name "value" .value) }}
{{- end }}

{{/* A key of a Secret. */}}
{{- define "mercato.secretVariable" -}}
{{- toJson (dict "name" .name "valueFrom" (dict "secretKeyRef" (dict "name" .secret "key" .key))) }}
{{- end }}

{{/* What the operator adds by `extraEnv`: of all processes, and of this one. `set` are the names that have a value already. */}}
{{- define "mercato.extraEnv" -}}
{{- range $name, $value := .extra }}
{{- $fromSecret := or (hasPrefix "DATABASE_URL" $name) (hasPrefix "MERCATO_SERVICE_SECRET" $name) (has $name (list "MERCATO_PUBLIC_KEYS" "MERCATO_SECRET" "MERCATO_POSTGRES_DSN")) }}
{{- if $fromSecret }}
{{- fail (printf "extraEnv: %s is a credential: the processes take it from their Secrets." $name) }}
{{- end }}
{{- if has $name $.set }}
{{- fail (printf "extraEnv: %s is set by the chart from other values: change those." $name) }}
{{- end }}
- {{ include "mercato.variable" (dict "name" $name "value" $value) }}
{{- end }}
{{- end }}

{{/* The variables that the chart sets for a process that serves. */}}
{{- define "mercato.ownEnv" -}}
{{- $values := .root.Values }}
- {name: MERCATO_LISTEN_HOST, value: "0.0.0.0"}
- {name: MERCATO_LISTEN_PORT, value: "8080"}
- {name: MERCATO_RPC_TRANSPORT, value: {{ $values.transport }}}
{{- if eq $values.transport "nats" }}
- {name: NATS_URL, value: {{ quote $values.nats.url }}}
{{- else }}
- {name: MERCATO_REGISTRY, value: dns}
- {name: MERCATO_SERVICES, value: {{ include "mercato.addresses" . | quote }}}
{{- if include "mercato.isCalled" . }}
- {name: MERCATO_RPC_ADDRESS, value: "0.0.0.0:9080"}
{{- end }}
{{- end }}
{{- if $values.tls.enabled }}
- {name: MERCATO_TLS_CERT, value: /tls/tls.crt}
- {name: MERCATO_TLS_KEY, value: /tls/tls.key}
{{- with $values.tls.name }}
- {name: MERCATO_TLS_NAME, value: {{ quote . }}}
{{- end }}
{{- else }}
- {name: MERCATO_PLAINTEXT, value: everywhere}
{{- end }}
{{- with get (include "mercato.authoritiesOf" . | fromJson) "nats" }}
- {name: MERCATO_TLS_CA, value: {{ .mountPath }}/{{ .key }}}
{{- else }}
{{- if $values.tls.enabled }}
- {name: MERCATO_TLS_CA, value: /tls/ca.crt}
{{- end }}
{{- end }}
{{- if $values.diagnostics.enabled }}
- {name: MERCATO_DIAGNOSTICS_ADDRESS, value: "0.0.0.0:9190"}
{{- end }}
{{- with $values.tracing.endpoint }}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ quote . }}}
{{- end }}
{{- with $values.metrics.tokenSecret }}
{{- if .name }}
- {{ include "mercato.secretVariable" (dict "name" "MERCATO_METRICS_TOKEN" "secret" .name "key" .key) }}
{{- end }}
{{- end }}
{{- if eq .component "gateway" }}
{{- with $values.corsOrigins }}
- {name: MERCATO_CORS_ORIGIN, value: {{ join ", " . | quote }}}
{{- end }}
{{- end }}
{{- if eq .component "users" }}
{{- with $values.mail }}
{{- if .secret.name }}
- {{ include "mercato.secretVariable" (dict "name" "MERCATO_USERS_MAIL" "secret" .secret.name "key" .secret.key) }}
{{- end }}
{{- with .sender }}
- {name: MERCATO_USERS_MAIL_SENDER, value: {{ quote . }}}
{{- end }}
{{- with .shopAddress }}
- {name: MERCATO_USERS_ADDRESS, value: {{ quote . }}}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* The variables of a process that serves, with those of `extraEnv`. */}}
{{- define "mercato.env" -}}
{{- $own := include "mercato.ownEnv" . }}
{{- $set := list }}
{{- range fromYamlArray $own }}
{{- $set = append $set .name }}
{{- end }}
{{- $extra := include "mercato.overlay" (dict "base" .root.Values.extraEnv "over" .config.extraEnv) | fromJson }}
{{- trim $own }}
{{ include "mercato.extraEnv" (dict "extra" $extra "set" $set) | trim }}
{{- end }}

{{/* The variables of the Job that migrates the databases of a server. */}}
{{- define "mercato.migrateEnv" -}}
{{- if .root.Values.databases.cloudNativePG.enabled }}
{{- $cluster := include "mercato.cluster" (dict "root" .root "server" .server.name) }}
{{- $ca := include "mercato.databaseCa" . | fromJson }}
{{- /* The operator makes the password of letters and digits alone, so that it stands in a URL as it is. */}}
- {{ include "mercato.secretVariable" (dict "name" "POSTGRES_PASSWORD" "secret" (printf "%s-superuser" $cluster) "key" "password") }}
- {name: MERCATO_POSTGRES_DSN, value: "postgresql://postgres:$(POSTGRES_PASSWORD)@{{ $cluster }}-rw:5432/postgres?sslmode=verify-full&sslrootcert={{ $ca.mountPath }}/{{ $ca.key }}"}
{{- else }}
- {{ include "mercato.secretVariable" (dict "name" "MERCATO_POSTGRES_DSN" "secret" .server.adminSecret "key" "postgres-dsn") }}
{{- end }}
- {{ include "mercato.secretVariable" (dict "name" "MERCATO_SECRET" "secret" .server.adminSecret "key" "secret") }}
{{ include "mercato.extraEnv" (dict "extra" .root.Values.extraEnv "set" list) | trim }}
{{- end }}
