{{- define "authz-server.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- /* Room is left for suffixes such as -valkey within the 63 characters of a name. */ -}}
{{- define "authz-server.fullname" -}}
{{- $name := include "authz-server.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- /* What gateways call: the provider's service and the DestinationRule's host. */ -}}
{{- define "authz-server.host" -}}
{{ include "authz-server.fullname" . }}.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}
{{- end }}

{{- /* Arguments: a dictionary with context and component. */ -}}
{{- define "authz-server.selectorLabels" -}}
app.kubernetes.io/name: {{ include "authz-server.name" .context }}
app.kubernetes.io/instance: {{ .context.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "authz-server.labels" -}}
{{ include "authz-server.selectorLabels" . }}
app.kubernetes.io/version: {{ .context.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .context.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .context.Chart.Name .context.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- with .context.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "authz-server.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "authz-server.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "authz-server.image" -}}
{{- with .Values.image }}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Pods and containers as the restricted Pod Security Standard wants them. */ -}}
{{- define "authz-server.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "authz-server.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- /* The store, for the server and for authzctl: variables, since Jobs run before the ConfigMap is there. */ -}}
{{- define "authz-server.redisEnv" -}}
{{- $redis := .Values.redis -}}
{{- if .Values.evaluation.enabled -}}
- name: AUTHZ_REDIS_URL
  value: redis://{{ include "authz-server.fullname" . }}-valkey:6379/0
{{- else if $redis.sentinel.nodes -}}
- name: AUTHZ_REDIS_SENTINELS
  value: {{ join "," $redis.sentinel.nodes | quote }}
- name: AUTHZ_REDIS_SENTINEL_PRIMARY
  value: {{ $redis.sentinel.primary | quote }}
- name: AUTHZ_REDIS_DATABASE
  value: {{ $redis.sentinel.database | quote }}
{{- with $redis.sentinel.username }}
- name: AUTHZ_REDIS_SENTINEL_USERNAME
  value: {{ . | quote }}
{{- end }}
{{- if $redis.sentinel.existingSecret }}
- name: AUTHZ_REDIS_SENTINEL_PASSWORD_FILE
  value: /etc/authz-server/sentinel/password
{{- end }}
{{- else if $redis.cluster.nodes -}}
- name: AUTHZ_REDIS_CLUSTER
  value: {{ join "," $redis.cluster.nodes | quote }}
{{- else -}}
- name: AUTHZ_REDIS_URL
  value: {{ $redis.url | quote }}
{{- end }}
- name: AUTHZ_REDIS_PREFIX
  value: {{ $redis.prefix | quote }}
{{- with $redis.username }}
- name: AUTHZ_REDIS_USERNAME
  value: {{ . | quote }}
{{- end }}
{{- if $redis.existingSecret }}
- name: AUTHZ_REDIS_PASSWORD_FILE
  value: /etc/authz-server/redis/password
{{- end }}
{{- if $redis.tls.enabled }}
- name: AUTHZ_REDIS_TLS
  value: "true"
{{- end }}
{{- if $redis.tls.caSecret }}
- name: AUTHZ_REDIS_TLS_CA
  value: /etc/authz-server/redis-ca/ca.crt
{{- end }}
{{- if $redis.tls.clientSecret }}
- name: AUTHZ_REDIS_TLS_CERTIFICATE
  value: /etc/authz-server/redis-client/tls.crt
- name: AUTHZ_REDIS_TLS_KEY
  value: /etc/authz-server/redis-client/tls.key
{{- end }}
{{- end }}

{{- /* Secrets of the store: a map of volume -> folder, Secret and the files taken from it. */ -}}
{{- define "authz-server.redisSecrets" -}}
{{- with .Values.redis }}
{{- if .existingSecret }}
redis-password: {folder: redis, secret: {{ .existingSecret | quote }}, items: [{key: {{ .passwordKey | quote }}, path: password}]}
{{- end }}
{{- if .sentinel.existingSecret }}
sentinel-password: {folder: sentinel, secret: {{ .sentinel.existingSecret | quote }}, items: [{key: {{ .sentinel.passwordKey | quote }}, path: password}]}
{{- end }}
{{- if .tls.caSecret }}
redis-ca: {folder: redis-ca, secret: {{ .tls.caSecret | quote }}, items: [{key: {{ .tls.caKey | quote }}, path: ca.crt}]}
{{- end }}
{{- if .tls.clientSecret }}
redis-client: {folder: redis-client, secret: {{ .tls.clientSecret | quote }}, items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}]}
{{- end }}
{{- end }}
{{- end }}

{{- define "authz-server.redisVolumeMounts" -}}
{{- range $name, $secret := include "authz-server.redisSecrets" . | fromYaml }}
- name: {{ $name }}
  mountPath: /etc/authz-server/{{ $secret.folder }}
  readOnly: true
{{- end }}
{{- end }}

{{- define "authz-server.redisVolumes" -}}
{{- range $name, $secret := include "authz-server.redisSecrets" . | fromYaml }}
- name: {{ $name }}
  secret:
    secretName: {{ $secret.secret }}
    defaultMode: 0440
    items:
      {{- toYaml $secret.items | nindent 6 }}
{{- end }}
{{- end }}

{{- /* Ports of the store, as a JSON list: those that are named, else those that its addresses name. */ -}}
{{- define "authz-server.redisPorts" -}}
{{- $ports := .Values.networkPolicy.redis.ports -}}
{{- if not $ports -}}
{{- range concat .Values.redis.sentinel.nodes .Values.redis.cluster.nodes -}}
{{- $ports = append $ports (regexFind "[0-9]+$" . | int) -}}
{{- end -}}
{{- if or .Values.redis.sentinel.nodes (not $ports) -}}
{{- $ports = append $ports (regexFind ":[0-9]+$" (urlParse .Values.redis.url).host | trimPrefix ":" | default "6379" | int) -}}
{{- end -}}
{{- end -}}
{{- $ports | uniq | toJson -}}
{{- end }}

{{- /* Where pods of every component may run. */ -}}
{{- define "authz-server.scheduling" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* A pod that runs one authzctl command and ends: a dictionary with context, component, args and restartPolicy. */ -}}
{{- define "authz-server.authzctlPod" -}}
{{- $context := .context -}}
{{- /* The same store, as another user. */ -}}
{{- $redis := $context.Values.redis -}}
{{- if $redis.jobs.username -}}
{{- $redis = merge (pick $redis.jobs "username" "existingSecret" "passwordKey") $redis -}}
{{- end -}}
{{- $store := dict "Release" $context.Release "Chart" $context.Chart "Values" (merge (dict "redis" $redis) $context.Values) -}}
metadata:
  labels:
    {{- include "authz-server.labels" . | nindent 4 }}
    {{- if $context.Values.istio.enabled }}
    sidecar.istio.io/inject: "false"
    {{- end }}
spec:
  restartPolicy: {{ .restartPolicy }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with include "authz-server.scheduling" $context }}
  {{- . | nindent 2 }}
  {{- end }}
  securityContext:
    {{- include "authz-server.podSecurityContext" $context | nindent 4 }}
  containers:
    - name: authzctl
      image: {{ include "authz-server.image" $context | quote }}
      imagePullPolicy: {{ $context.Values.image.pullPolicy }}
      command: [authzctl]
      args:
        {{- toYaml .args | nindent 8 }}
      env:
        {{- include "authz-server.redisEnv" $store | nindent 8 }}
        - name: AUTHZCTL_ACTOR
          value: {{ printf "helm/%s" $context.Release.Name | quote }}
        {{- with $context.Values.settings.history_events }}
        - name: AUTHZ_HISTORY_EVENTS
          value: {{ int . | quote }}
        {{- end }}
        {{- with $context.Values.settings.history_days }}
        - name: AUTHZ_HISTORY_DAYS
          value: {{ int . | quote }}
        {{- end }}
      securityContext:
        {{- include "authz-server.securityContext" $context | nindent 8 }}
      resources:
        {{- toYaml $context.Values.jobResources | nindent 8 }}
      {{- with include "authz-server.redisVolumeMounts" $store }}
      volumeMounts:
        {{- . | nindent 8 }}
      {{- end }}
  {{- with include "authz-server.redisVolumes" $store }}
  volumes:
    {{- . | nindent 4 }}
  {{- end }}
{{- end }}

{{- /* How long the server takes to leave after SIGTERM, at most. */ -}}
{{- define "authz-server.leavingSeconds" -}}
{{ add .Values.drain.seconds .Values.drain.graceSeconds }}
{{- end }}

{{- define "authz-server.terminationGracePeriodSeconds" -}}
{{ .Values.drain.terminationGracePeriodSeconds | default (add (include "authz-server.leavingSeconds" . | int) 10) }}
{{- end }}

{{- define "authz-server.sidecar" -}}
{{- if and .Values.istio.enabled .Values.istio.sidecar }}true{{ end }}
{{- end }}

{{- define "authz-server.gatewayPrincipal" -}}
{{- with .Values.istio -}}
{{ .trustDomain }}/ns/{{ .gateway.namespace }}/sa/{{ .gateway.serviceAccount }}
{{- end }}
{{- end }}

{{- /* Headers that only the server may write: the instance, and the tenant unless requests name theirs by it. */ -}}
{{- define "authz-server.strippedHeaders" -}}
{{- $settings := .Values.settings -}}
{{- $tenantHeader := $settings.tenant_header | default "x-tenant-id" -}}
{{- $sources := $settings.tenant_from | default "header:x-tenant-id" -}}
{{- if kindIs "string" $sources -}}
{{- $sources = splitList "," (nospace $sources) -}}
{{- end -}}
{{- $headers := list ($settings.routing_header | default "x-tenant-instance") -}}
{{- if not (has (printf "header:%s" $tenantHeader) $sources) -}}
{{- $headers = append $headers $tenantHeader -}}
{{- end -}}
{{- $headers | toJson -}}
{{- end }}

{{- /* The policy that makes gateways ask, and at uninstallation the one that takes its place. */ -}}
{{- define "authz-server.customPolicyHead" -}}
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: {{ include "authz-server.fullname" . }}
  namespace: {{ .Values.istio.gateway.namespace }}
  labels:
    {{- include "authz-server.labels" (dict "context" . "component" "mesh") | nindent 4 }}
{{- end }}

{{- /* Without rules it matches nothing. */ -}}
{{- define "authz-server.customPolicySpec" -}}
spec:
  selector:
    matchLabels:
      {{- toYaml .Values.istio.gateway.labels | nindent 6 }}
  action: CUSTOM
  provider:
    name: {{ .Values.istio.provider.name }}
{{- end }}

{{- /* Where the server and authzctl connect to: names and Redis. */ -}}
{{- define "authz-server.egress" -}}
{{- with .Values.networkPolicy -}}
- to:
    - namespaceSelector:
        matchLabels:
          {{- toYaml .dns.namespaceLabels | nindent 10 }}
      {{- with .dns.podLabels }}
      podSelector:
        matchLabels:
          {{- toYaml . | nindent 10 }}
      {{- end }}
  ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
{{- end }}
{{- if .Values.evaluation.enabled }}
- to:
    - podSelector:
        matchLabels:
          {{- include "authz-server.selectorLabels" (dict "context" . "component" "valkey") | nindent 10 }}
  ports:
    - port: 6379
{{- else }}
- ports:
    {{- range include "authz-server.redisPorts" . | fromJsonArray }}
    - port: {{ int . }}
    {{- end }}
  {{- with .Values.networkPolicy.redis.to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}
