{{/*
What several templates share. A component is a service, the gateway, `migrate` or `test`: its name is in the label
`app.kubernetes.io/component`. Helpers that give more than a text give JSON.
*/}}

{{/* The services that call each other and have a database: `topology.SERVICES`. */}}
{{- define "mercato.services" -}}
["users", "products", "inventory", "sandbox", "payments", "orders", "events"]
{{- end }}

{{/* The services that each process calls in others, and whose events it reads: `topology.called_by`. */}}
{{- define "mercato.calls" -}}
{
  "gateway": ["events", "inventory", "orders", "payments", "products", "users"],
  "users": ["orders", "products"],
  "products": ["inventory", "users"],
  "inventory": ["products", "users"],
  "sandbox": ["users"],
  "payments": ["sandbox", "users"],
  "orders": ["inventory", "payments", "products", "users"],
  "events": ["inventory", "orders", "payments", "products", "users"]
}
{{- end }}

{{/* The components that serve in this release. */}}
{{- define "mercato.serving" -}}
{{- $names := list "gateway" }}
{{- range $name := include "mercato.services" . | fromJsonArray }}
{{- if or (ne $name "sandbox") $.Values.services.sandbox.enabled }}
{{- $names = append $names $name }}
{{- end }}
{{- end }}
{{- toJson $names }}
{{- end }}

{{/* At most 32 characters: with what follows it is a name of a Service, and of a Cluster of CloudNativePG (50). */}}
{{- define "mercato.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $full .Values.fullnameOverride | trunc 32 | trimSuffix "-" }}
{{- end }}

{{/* The labels by which pods are selected: of the release, or of a component of it. They never change. */}}
{{- define "mercato.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{- define "mercato.labels" -}}
{{ include "mercato.selector" . }}
app.kubernetes.io/part-of: mercato
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "mercato.image" -}}
{{- $image := .root.Values.image }}
{{- with $image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ $image.repository }}/{{ .component }}
{{- with index $image.digests .component }}@{{ . }}{{ else }}:{{ default .root.Chart.AppVersion $image.tag }}{{ end }}
{{- end }}

{{/* The map `base`, in which the keys of `over` count, on every level: unlike `merge`, also where they are false. */}}
{{- define "mercato.overlay" -}}
{{- $result := deepCopy .base }}
{{- range $key, $value := .over }}
{{- $former := get $result $key }}
{{- if and (kindIs "map" $value) (kindIs "map" $former) }}
{{- $value = include "mercato.overlay" (dict "base" $former "over" $value) | fromJson }}
{{- end }}
{{- $_ := set $result $key $value }}
{{- end }}
{{- toJson $result }}
{{- end }}

{{/* The values of a component: `defaults`, `services` on them. */}}
{{- define "mercato.config" -}}
{{- include "mercato.overlay" (dict "base" .root.Values.defaults "over" (index .root.Values.services .component)) }}
{{- end }}

{{/* The servers of PostgreSQL; by default one for all services. */}}
{{- define "mercato.servers" -}}
{{- $admin := printf "%s-admin" .Values.secrets.prefix }}
{{- $given := default (list (dict "name" "main" "services" (include "mercato.services" . | fromJsonArray))) .Values.databases.servers }}
{{- $servers := list }}
{{- range $given }}
{{- $servers = append $servers (merge (dict) . (dict "adminSecret" $admin "egress" list)) }}
{{- end }}
{{- toJson $servers }}
{{- end }}

{{/* The Cluster of CloudNativePG for the server `server`. */}}
{{- define "mercato.cluster" -}}
{{ include "mercato.fullname" .root }}-db-{{ .server }}
{{- end }}

{{- define "mercato.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "mercato.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What all pods have, whatever they do. */}}
{{- define "mercato.podCommon" -}}
serviceAccountName: {{ include "mercato.fullname" .root }}-{{ .component }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "mercato.podSecurity" . | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Where a container may write; in memory, and so within its limit. */}}
{{- define "mercato.scratch" -}}
emptyDir:
  medium: Memory
  sizeLimit: 16Mi
{{- end }}
