{{- define "headrace.name" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "headrace.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "headrace.instance" . }}
{{- end }}

{{- define "headrace.instance" -}}
app.kubernetes.io/name: headrace
app.kubernetes.io/instance: {{ include "headrace.name" . }}
{{- end }}

{{- /* (list root component): what selects the pods of one part. */ -}}
{{- define "headrace.selector" -}}
{{ include "headrace.instance" (index . 0) }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- /* (list root component): labels of a pod. */ -}}
{{- define "headrace.podLabels" -}}
{{ include "headrace.selector" . }}
{{- with (index . 0).Values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* (list root repository-with-or-without-tag tag digest) */ -}}
{{- define "headrace.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- with index . 3 }}{{ $image = printf "%s@%s" $image . }}{{ else }}{{ with index $ 2 }}{{ $image = printf "%s:%s" $image . }}{{ end }}{{ end -}}
{{- with $root.Values.global.imageRegistry }}{{ $image = printf "%s/%s" (trimSuffix "/" .) $image }}{{ end -}}
{{- $image -}}
{{- end }}

{{- /* (list root part): the image of gateway, controller or worker. */ -}}
{{- define "headrace.ownImage" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.image (index . 1) -}}
{{- include "headrace.image" (list $root $image.repository ($root.Values.image.tag | default $root.Chart.AppVersion) $image.digest) -}}
{{- end }}

{{- define "headrace.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* The images in deploy/docker have the user 10001. An identity that is null is left to the cluster (OpenShift). */ -}}
{{- define "headrace.podSecurity" -}}
{{- $ids := .Values.podSecurity | default dict -}}
runAsNonRoot: true
{{- range list "runAsUser" "runAsGroup" "fsGroup" }}
{{- if not (kindIs "invalid" (get $ids . | default nil)) }}
{{ . }}: {{ get $ids . | int }}
{{- end }}
{{- end }}
fsGroupChangePolicy: OnRootMismatch
{{- with $ids.supplementalGroups }}
supplementalGroups: {{ toJson . }}
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "headrace.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
privileged: false
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "headrace.secret" -}}
{{- .Values.existingSecret | default (printf "%s-secrets" (include "headrace.name" .)) -}}
{{- end }}

{{- /* The Secret of hf-token and Valkey's password, which may change: "headrace.secret" is immutable. */ -}}
{{- define "headrace.tokensSecret" -}}
{{- .Values.tokens.existingSecret | default (include "headrace.secret" .) -}}
{{- end }}

{{- /* (list root role) */ -}}
{{- define "headrace.linkSecret" -}}
{{- $root := index . 0 -}}
{{- index $root.Values.link (printf "%sSecret" (index . 1)) | default (printf "%s-link-%s" (include "headrace.name" $root) (index . 1)) -}}
{{- end }}

{{- /* (list root listener): a port of config.gateway.listen. */ -}}
{{- define "headrace.port" -}}
{{- index (index . 0).Values.config.gateway.listen (index . 1) | splitList ":" | last -}}
{{- end }}

{{- /* The configuration without what gateways do not read at their start: a new model restarts none of them. */ -}}
{{- define "headrace.gatewayChecksum" -}}
{{- omit .Values.config "models" "ray" "weights" | toYaml | sha256sum -}}
{{- end }}

{{- define "headrace.probePort" -}}50054{{- end }}

{{- define "headrace.controllerMetricsPort" -}}9401{{- end }}

{{- define "headrace.priority" -}}
{{- $root := index . 0 -}}
{{- $named := get ($root.Values.priorityClasses.names | default dict) (index . 1) -}}
{{- if index . 2 }}{{ index . 2 }}{{ else if $named }}{{ $named }}{{ else if $root.Values.priorityClasses.create }}{{ printf "%s-%s" (include "headrace.name" $root) (index . 1) }}{{ end -}}
{{- end }}

{{- define "headrace.rayName" -}}
{{- printf "%s-%s" (include "headrace.name" (index . 0)) (index . 1) -}}
{{- end }}

{{- define "headrace.valkeyAddress" -}}
{{- .Values.valkey.address | default (ternary (printf "%s-valkey:6379" (include "headrace.name" .)) "" .Values.valkey.embedded.enabled) -}}
{{- end }}

{{- /* A password in limits_url makes the whole file a Secret. */ -}}
{{- define "headrace.configIsSecret" -}}
{{- if regexMatch "^rediss?://[^/@]*:[^/@]+@" (dig "store" "limits_url" "" .Values.config) }}true{{ end -}}
{{- end }}

{{- define "headrace.configVolume" -}}
name: config
{{- if include "headrace.configIsSecret" . }}
secret: {secretName: {{ include "headrace.name" . }}-config, defaultMode: 288}
{{- else }}
configMap: {name: {{ include "headrace.name" . }}-config}
{{- end }}
{{- end }}

{{- /* config.gateway.drain_timeout_s in whole seconds. */ -}}
{{- define "headrace.drainSeconds" -}}
{{- ceil (dig "drain_timeout_s" 300 .Values.config.gateway) | int -}}
{{- end }}

{{- /* (list root extra drain): the environment of a Ray container. `drain`: how long `ray start` waits after SIGTERM.
Replicas get those that ray/replica_actor.py passes on, and what their node has. */ -}}
{{- define "headrace.rayEnv" -}}
- {name: HOME, value: /tmp}
- {name: HEADRACE_CACHE_DIR, value: /tmp/headrace}
- {name: HEADRACE_LOG_LEVEL, value: {{ dig "observe" "log_level" "info" (index . 0).Values.config }}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ index . 2 | quote }}}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
# Ray redirects the output of replicas into files; they copy it to the container's, so that `kubectl logs` shows it.
- {name: HEADRACE_LOG_COPY, value: /proc/1/fd/1}
{{- if ne (get ((index . 0).Values.podSecurity | default dict) "runAsUser" | toString) "10001" }}
- {name: USER, value: headrace}    # PyTorch and vLLM ask for a user name, and only 10001 has one in the images
{{- end }}
{{- with index . 1 }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* (list root group): environment variables of a worker group. Those of the group override ray.extraEnv. */ -}}
{{- define "headrace.groupEnv" -}}
{{- $group := (index . 1).extraEnv | default list -}}
{{- $own := dict -}}{{- range $group }}{{ $_ := set $own .name true }}{{ end -}}
{{- $all := list -}}
{{- range (index . 0).Values.ray.extraEnv }}{{ if not (hasKey $own .name) }}{{ $all = append $all . }}{{ end }}{{ end -}}
{{- concat $all $group | toYaml -}}
{{- end }}

{{- /* A CPU quantity as whole CPUs, at least 1: Ray counts whole ones. */ -}}
{{- define "headrace.cpus" -}}
{{- $text := toString . -}}
{{- if hasSuffix "m" $text }}{{ max 1 (div (int (trimSuffix "m" $text)) 1000) }}{{ else }}{{ max 1 (int (floor (float64 $text))) }}{{ end -}}
{{- end }}

{{- /* 8Gi as bytes. */ -}}
{{- define "headrace.bytes" -}}
{{- $units := dict "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- $length := sub (len .) 2 | int -}}
{{- mulf (float64 (substr 0 $length .)) (index $units (substr $length -1 .)) -}}
{{- end }}

{{- /* The size of /dev/shm: Ray's object store gets half of it, at most 1 GB, and engines the rest. No token passes
through the store; Ray's own default is 30 % of the memory, and falls to disk where /dev/shm is smaller. */ -}}
{{- define "headrace.objectStore" -}}
{{- printf "%.0f" (minf 1000000000 (divf (include "headrace.bytes" . | float64) 2) | floor) -}}
{{- end }}

{{- /* (list resources sizes): the resources with a request for the node's disk: what the pod's emptyDirs may hold, and
its log files. Without it nodes are filled until the kubelet evicts. A request or limit that is given stays. */ -}}
{{- define "headrace.withDisk" -}}
{{- $resources := deepCopy (index . 0) -}}
{{- if and (not (dig "requests" "ephemeral-storage" "" $resources)) (not (dig "limits" "ephemeral-storage" "" $resources)) -}}
{{- $bytes := include "headrace.bytes" "64Mi" | float64 -}}
{{- range index . 1 }}{{ $bytes = addf $bytes (include "headrace.bytes" . | float64) }}{{ end -}}
{{- $request := dict "ephemeral-storage" (printf "%.0fMi" (divf $bytes 1048576 | ceil)) -}}
{{- $_ := set $resources "requests" (merge $request ($resources.requests | default dict)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{- /* {cidrs, ports}: one rule, or none where there is no address. */ -}}
{{- define "headrace.egress" -}}
{{- if .cidrs -}}
- ports:
    {{- range .ports }}
    - {port: {{ int . }}, protocol: TCP}
    {{- end }}
  to:
    {{- range .cidrs }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
{{- end }}
{{- end }}

{{- /* Whether config.ray names one of ray.clusters. */ -}}
{{- define "headrace.someRayIsUsed" -}}
{{- $names := dict -}}
{{- range .Values.config.ray }}{{ $_ := set $names .name true }}{{ end -}}
{{- range .Values.ray.clusters }}{{ if hasKey $names .name }}true{{ end }}{{ end -}}
{{- end }}
