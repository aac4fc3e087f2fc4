{{/*
Rules of NetworkPolicies. A rule without peers would allow every peer: `to` and `from` are never empty here.
*/}}

{{/* The labels of the pods of a component, as a peer. */}}
{{- define "mercato.peer" -}}
podSelector:
  matchLabels:
    {{- include "mercato.selector" . | nindent 4 }}
{{- end }}

{{/* A rule for each of `targets`: {to, port}. */}}
{{- define "mercato.egress" -}}
{{- range . }}
- to:
    {{- toYaml .to | nindent 4 }}
  ports:
    - port: {{ .port }}
      protocol: TCP
{{ end }}
{{- end }}

{{- define "mercato.egressToDns" -}}
{{- with .Values.networkPolicy.dns }}
- to:
    {{- toYaml .to | nindent 4 }}
  ports:
    - port: {{ .port }}
      protocol: UDP
    - port: {{ .port }}
      protocol: TCP
{{- end }}
{{- end }}

{{/* To the database of a server. */}}
{{- define "mercato.egressToDatabase" -}}
{{- $peer := dict "podSelector" dict }}
{{- if .root.Values.databases.cloudNativePG.enabled }}
{{- $cluster := include "mercato.cluster" (dict "root" .root "server" .server.name) }}
{{- $peer = dict "podSelector" (dict "matchLabels" (dict "cnpg.io/cluster" $cluster)) }}
{{- end }}
{{- $default := list (dict "to" (list $peer) "port" 5432) }}
{{- include "mercato.egress" (default (default $default .root.Values.networkPolicy.postgres) .server.egress) | trim }}
{{- end }}

{{/* All that a component which serves may reach. */}}
{{- define "mercato.egressOf" -}}
{{- $values := .root.Values }}
{{- $component := .component }}
{{- include "mercato.egressToDns" .root }}
{{- range $server := include "mercato.servers" .root | fromJsonArray }}
{{- if has $component $server.services }}
{{ include "mercato.egressToDatabase" (dict "root" $.root "server" $server) }}
{{- end }}
{{- end }}
{{- if eq $values.transport "nats" }}
{{ include "mercato.egress" $values.networkPolicy.nats | trim }}
{{- else }}
- to:
    {{- range index (include "mercato.calls" . | fromJson) $component }}
    - {{ include "mercato.peer" (dict "root" $.root "component" .) | indent 6 | trim }}
    {{- end }}
  ports:
    - port: 9080
      protocol: TCP
{{- end }}
{{- if $values.tracing.endpoint }}
{{ include "mercato.egress" $values.networkPolicy.otlp | trim }}
{{- end }}
{{- if and (eq $component "users") $values.mail.secret.name }}
{{ include "mercato.egress" $values.networkPolicy.mail | trim }}
{{- end }}
{{- end }}

{{/* All that may reach a component which serves; empty if nothing does. */}}
{{- define "mercato.ingressOf" -}}
{{- $policy := .root.Values.networkPolicy }}
{{- if eq .component "gateway" }}
- from:
    {{- toYaml $policy.gateway.from | nindent 4 }}
    - {{ include "mercato.peer" (dict "root" .root "component" "test") | indent 6 | trim }}
  ports:
    - port: 8080
      protocol: TCP
{{- if include "mercato.hasGrpc" . }}
- from:
    {{- toYaml $policy.gateway.from | nindent 4 }}
  ports:
    - port: 9090
      protocol: TCP
{{- end }}
{{- end }}
{{- with $policy.prometheus.from }}
- from:
    {{- toYaml . | nindent 4 }}
  ports:
    - port: 8080
      protocol: TCP
{{- end }}
{{- if include "mercato.isCalled" . }}
- from:
    {{- range $caller, $called := include "mercato.calls" . | fromJson }}
    {{- if has $.component $called }}
    - {{ include "mercato.peer" (dict "root" $.root "component" $caller) | indent 6 | trim }}
    {{- end }}
    {{- end }}
  ports:
    - port: 9080
      protocol: TCP
{{- end }}
{{- if .root.Values.diagnostics.enabled }}
{{- with $policy.diagnostics.from }}
- from:
    {{- toYaml . | nindent 4 }}
  ports:
    - port: 9190
      protocol: TCP
{{- end }}
{{- end }}
{{- end }}
