{{/*
Certificate authorities: by which the processes verify servers of PostgreSQL, and NATS. An authority is {secret or
configMap, key}, and with `mountPath` the folder in which DSNs name it; where neither name is given, there is none.
*/}}

{{/* The authority of the database server `server`; of a Cluster of CloudNativePG by default its own. */}}
{{- define "mercato.databaseCa" -}}
{{- $values := .root.Values.databases }}
{{- $own := default dict .server.ca }}
{{- $ca := ternary (omit $values.ca "secret" "configMap") $values.ca (or $own.secret $own.configMap | not | not) }}
{{- $ca = include "mercato.overlay" (dict "base" $ca "over" $own) | fromJson }}
{{- if and $values.cloudNativePG.enabled (not (or $ca.secret $ca.configMap)) }}
{{- $_ := set $ca "secret" (printf "%s-ca" (include "mercato.cluster" (dict "root" .root "server" .server.name))) }}
{{- $_ := set $ca "key" "ca.crt" }}
{{- end }}
{{- toJson $ca }}
{{- end }}

{{/* What a pod mounts: by the name of the volume, an authority. `servers` are those that it connects to: none or one. */}}
{{- define "mercato.authorities" -}}
{{- $found := dict }}
{{- range .servers }}
{{- $ca := include "mercato.databaseCa" (dict "root" $.root "server" .) | fromJson }}
{{- if or $ca.secret $ca.configMap }}
{{- $_ := set $found "postgres" $ca }}
{{- end }}
{{- end }}
{{- $nats := .root.Values.nats.ca }}
{{- if and .nats (or $nats.secret $nats.configMap) }}
{{- $_ := set $found "nats" (merge (dict "mountPath" "/nats") $nats) }}
{{- end }}
{{- toJson $found }}
{{- end }}

{{/* Those of a component which serves. */}}
{{- define "mercato.authoritiesOf" -}}
{{- $servers := list }}
{{- range include "mercato.servers" .root | fromJsonArray }}
{{- if has $.component .services }}
{{- $servers = append $servers . }}
{{- end }}
{{- end }}
{{- include "mercato.authorities" (dict "root" .root "servers" $servers "nats" true) }}
{{- end }}

{{- define "mercato.authorityMounts" -}}
{{- range $name, $ca := . }}
- name: {{ $name }}
  mountPath: {{ $ca.mountPath }}
  readOnly: true
{{- end }}
{{- end }}

{{- define "mercato.authorityVolumes" -}}
{{- range $name, $ca := . }}
- name: {{ $name }}
  {{- if $ca.secret }}
  secret:
    secretName: {{ $ca.secret }}
  {{- else }}
  configMap:
    name: {{ $ca.configMap }}
  {{- end }}
    defaultMode: 0440
    items:
      - key: {{ $ca.key }}
        path: {{ $ca.key }}
{{- end }}
{{- end }}

{{- define "mercato.checkAuthorities" -}}
{{- $nats := .Values.nats }}
{{- if or $nats.ca.secret $nats.ca.configMap }}
{{- include "mercato.checkAuthority" (dict "ca" $nats.ca "where" "nats.ca") }}
{{- if ne .Values.transport "nats" }}
{{- fail (printf "nats.ca: with transport %s there is no NATS: leave it out." .Values.transport) }}
{{- end }}
{{- if hasPrefix "nats://" $nats.url }}
{{- fail (printf "nats.ca: nats.url is %s, which is not encrypted: write tls://HOST:PORT." $nats.url) }}
{{- end }}
{{- if and .Values.diagnostics.enabled (not .Values.tls.enabled) }}
{{- fail "nats.ca: with diagnostics.enabled the pods need certificates of their own too: enable tls." }}
{{- end }}
{{- end }}
{{- range $server := include "mercato.servers" . | fromJsonArray }}
{{- $ca := include "mercato.databaseCa" (dict "root" $ "server" $server) | fromJson }}
{{- include "mercato.checkAuthority" (dict "ca" $ca "where" (ternary (printf "databases.servers: the ca of %s" $server.name) "databases.ca" (hasKey $server "ca"))) }}
{{- range $server.services }}
{{- include "mercato.checkSecret" (dict "root" $ "ca" $ca "secret" (printf "%s-%s" $.Values.secrets.prefix .)) }}
{{- end }}
{{- if not $.Values.databases.cloudNativePG.enabled }}
{{- include "mercato.checkSecret" (dict "root" $ "ca" $ca "secret" $server.adminSecret) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "mercato.checkAuthority" -}}
{{- if and .ca.secret .ca.configMap }}
{{- fail (printf "%s: it names the Secret %s and the ConfigMap %s: name one of them." .where .ca.secret .ca.configMap) }}
{{- end }}
{{- with .ca.mountPath }}
{{- if regexMatch "^/(tmp|data|tls|nats|etc|opt|usr|lib|bin|sbin|dev|proc|sys|run|var|home|root)(/|$)" . }}
{{- fail (printf "%s: the folder %s has something else in the pods: take another mountPath, such as /postgres." $.where .) }}
{{- end }}
{{- end }}
{{- end }}

{{/* The DSNs in a Secret name a file that the pods have. Without a cluster (`helm template`) no Secret is seen. */}}
{{- define "mercato.checkSecret" -}}
{{- $file := printf "%s/%s" .ca.mountPath .ca.key }}
{{- $isMounted := or .ca.secret .ca.configMap }}
{{- range $key, $value := (lookup "v1" "Secret" .root.Release.Namespace .secret).data }}
{{- if or (hasPrefix "DATABASE_URL" $key) (eq "postgres-dsn" $key) }}
{{- $dsn := b64dec $value }}
{{- $named := regexFind "[?&]sslrootcert=[^&]*" $dsn | trimPrefix "?" | trimPrefix "&" | trimPrefix "sslrootcert=" | replace "%2F" "/" | replace "%2f" "/" }}
{{- $where := printf "databases.ca: the DSN in the Secret %s" $.secret }}
{{- if and (not $named) (regexMatch "[?&]sslmode=verify-" $dsn) }}
{{- fail (printf "%s verifies the server without a file to do it by: add sslrootcert to it." $where) }}
{{- end }}
{{- if and $named (not (hasPrefix "/etc/ssl/" $named)) (not (and $isMounted (eq $named $file))) }}
{{- fail (printf "%s has sslrootcert=%s, a file that the pods do not have: %s." $where $named (ternary (printf "the authority is mounted as %s" $file) (printf "name the Secret or the ConfigMap that is mounted as %s" $file) (not (not $isMounted)))) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
