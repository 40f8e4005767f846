{{- /* weight: annotations of the hooks that check the configuration before anything is changed. */ -}}
{{- define "headrace.checkHook" -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{- /* (list root model min): whether the worker groups of the model's Ray cluster can hold its least replicas, on one of
its types of GPU. Nothing is known of a cluster that this release does not make. */ -}}
{{- define "headrace.checkGroups" -}}
{{- $root := index . 0 }}{{ $model := index . 1 }}{{ $min := index . 2 }}
{{- $first := dict }}{{ with $root.Values.config.ray }}{{ $first = first . }}{{ end }}
{{- $ray := $model.ray | default (get $first "name") }}
{{- $choices := list }}
{{- if kindIs "slice" $model.gpu }}{{ $choices = $model.gpu }}{{ else }}{{ $choices = list (dict "type" ($model.gpu | default "")) }}{{ end }}
{{- $why := "" }}{{ $fits := false }}{{ $known := false }}
{{- range $cluster := $root.Values.ray.clusters }}
{{- if eq $cluster.name $ray }}
{{- $known = true }}
{{- range $choice := $choices }}
{{- $tp := int ($choice.tensor_parallel_size | default $model.tensor_parallel_size | default 1) }}
{{- $pp := int ($choice.pipeline_parallel_size | default $model.pipeline_parallel_size | default 1) }}
{{- $need := mul $tp $pp }}
{{- $spread := or (gt $pp 1) ($model.allow_cross_node_tensor_parallel | default false) }}
{{- $types := list }}{{ $whole := 0 }}{{ $gpus := 0 }}{{ $largest := 0 }}{{ $there := false }}
{{- range $group := $cluster.workerGroups }}
{{- $types = append $types ($group.gpuType | default "any" | toString) }}
{{- if or (not $choice.type) (eq ($choice.type | toString) ($group.gpuType | default "" | toString)) }}
{{- $there = true }}
{{- $node := add (int ($group.gpusPerNode | default 0)) (int ($group.logicalGpus | default 0)) }}
{{- $largest = max $largest $node }}
{{- $nodes := mul (int $group.maxReplicas) (int ($group.numOfHosts | default 1)) }}
{{- $gpus = add $gpus (mul $node $nodes) }}
{{- $whole = add $whole (mul (div $node $need) $nodes) }}
{{- end }}
{{- end }}
{{- $holds := int (ternary (div $gpus $need) $whole $spread) }}
{{- if not $there }}
{{- $why = $why | default (printf "gpu is %s, and no worker group of ray.clusters[%s] has this gpuType; there are %s" ($choice.type | toString) $ray ($types | uniq | join ", ")) }}
{{- else if not $holds }}
{{- $why = $why | default (printf "one replica needs %d GPUs (tensor_parallel_size %d, pipeline_parallel_size %d)%s, and the worker groups of ray.clusters[%s] have %d a node, %d in all: lower it, or raise gpusPerNode or maxReplicas" (int $need) $tp $pp (ternary "" " on one node" $spread) $ray (int $largest) (int $gpus)) }}
{{- else if lt $holds $min }}
{{- $why = $why | default (printf "replicas.min is %d, and the worker groups of ray.clusters[%s] hold %d at most: raise their maxReplicas, or lower replicas.min" $min $ray $holds) }}
{{- else }}
{{- $fits = true }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- if and $known (not $fits) (not (hasPrefix "sim://" ($model.source | toString))) }}
{{- fail (printf "config.models[%s]: %s" $model.name $why) }}
{{- end }}
{{- end }}

{{- /* Listeners of one pod have ports of their own. */ -}}
{{- define "headrace.checkListeners" -}}
{{- $taken := dict }}
{{- range $listener := list "grpc" "http" "link" "admin" "metrics" }}
{{- $port := include "headrace.port" (list $ $listener) }}
{{- if hasKey $taken $port }}
{{- fail (printf "config.gateway.listen.%s and config.gateway.listen.%s both have port %s: give each its own" (get $taken $port) $listener $port) }}
{{- end }}
{{- if gt (int $port) 65535 }}
{{- fail (printf "config.gateway.listen.%s has port %s: a port is 1 to 65535" $listener $port) }}
{{- end }}
{{- $_ := set $taken $port $listener }}
{{- end }}
{{- end }}

{{- /* Services that `config` names and this release makes under another name. */ -}}
{{- define "headrace.checkNames" -}}
{{- $name := include "headrace.name" . }}
{{- $mine := printf "%s-links" $name }}{{ $found := false }}{{ $other := "" }}
{{- range .Values.config.link.gateways }}
{{- $host := . | toString | trimPrefix "srv://_link._tcp." | splitList ":" | first | splitList "." | first }}
{{- if eq $host $mine }}{{ $found = true }}{{ else if hasSuffix "-links" $host }}{{ $other = . }}{{ end }}
{{- end }}
{{- if and $other (not $found) }}
{{- fail (printf "config.link.gateways names %s, and the Service of this release is %s (fullnameOverride is %q): workers would dial nobody; set [\"srv://_link._tcp.%s\"]" $other $mine (.Values.fullnameOverride | toString) $mine) }}
{{- end }}
{{- if .Values.postgresql.embedded.enabled }}
{{- $url := .Values.config.store.database_url | toString }}
{{- $authority := $url | splitList "://" | last | splitList "/" | first | splitList "@" | last }}
{{- $host := $authority | splitList ":" | first | splitList "." | first }}
{{- if ne $host (printf "%s-postgresql" $name) }}
{{- fail (printf "postgresql.embedded.enabled is true, and config.store.database_url names %s: the embedded one is %s-postgresql, and the network policy blocks others; set postgresql+psycopg://headrace@%s-postgresql/headrace, or turn the embedded one off" $authority $name $name) }}
{{- end }}
{{- end }}
{{- if and .Values.valkey.embedded.enabled (dig "store" "limits_url" "" .Values.config) }}
{{- $authority := .Values.config.store.limits_url | toString | splitList "://" | last | splitList "/" | first | splitList "@" | last }}
{{- $host := $authority | splitList ":" | first | splitList "." | first }}
{{- if ne $host (printf "%s-valkey" $name) }}
{{- fail (printf "valkey.embedded.enabled is true, and config.store.limits_url names %s: the embedded one is %s-valkey, and the network policy blocks others; set redis://%s-valkey:6379/0, or turn the embedded one off" $authority $name $name) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Files that `config` names lie in volumes that the pods which read them mount. */ -}}
{{- define "headrace.checkFiles" -}}
{{- $config := .Values.config }}
{{- $gateway := list "/tls/*" "/link/*" "/revoked/*" "/secrets/cluster" "/secrets/key-pepper" }}
{{- $mounts := .Values.gateway.extraVolumeMounts }}
{{- range dig "spec" "containers" list (.Values.gateway.podTemplate | default dict) }}{{ if eq .name "gateway" }}{{ $mounts = concat $mounts (.volumeMounts | default list) }}{{ end }}{{ end }}
{{- range $mounts }}{{ $gateway = append $gateway (printf "%s/*" (trimSuffix "/" .mountPath)) }}{{ end }}
{{- range $mounts }}{{ if .subPath }}{{ $gateway = append $gateway .mountPath }}{{ end }}{{ end }}
{{- $files := list }}
{{- range $section := list "tls" "link_tls" }}
{{- range $key, $path := index $config.gateway $section | default dict }}{{ $files = append $files (list (printf "gateway.%s.%s" $section $key) $path $gateway) }}{{ end }}
{{- end }}
{{- with dig "auth" "cluster_secret_file" "" $config }}{{ $files = append $files (list "auth.cluster_secret_file" . $gateway) }}{{ end }}
{{- with dig "auth" "api_keys" dict $config | default dict }}{{ with .pepper_file }}{{ $files = append $files (list "auth.api_keys.pepper_file" . $gateway) }}{{ end }}{{ end }}
{{- with dig "observe" "budget_webhook" dict $config | default dict }}{{ with .secret_file }}{{ $files = append $files (list "observe.budget_webhook.secret_file" . $gateway) }}{{ end }}{{ end }}
{{- range $key := list "ca_file" "headers_file" }}{{ with dig "observe" "tracing" dict $config | default dict }}{{ with index . $key }}{{ $files = append $files (list (printf "observe.tracing.%s" $key) . $gateway) }}{{ end }}{{ end }}{{ end }}
{{- range $tenant := concat (list ($config.tenant_defaults | default dict)) ($config.tenants | default list) }}
{{- range $guard := $tenant.guards | default list }}
{{- with $guard.patterns_file }}{{ $files = append $files (list (printf "tenants[%s].guards.patterns_file" ($tenant.name | default "tenant_defaults")) . $gateway) }}{{ end }}
{{- with $guard.ca_file }}{{ $files = append $files (list (printf "tenants[%s].guards.ca_file" ($tenant.name | default "tenant_defaults")) . $gateway) }}{{ end }}
{{- end }}
{{- end }}
{{- range $key, $path := $config.link.tls | default dict }}{{ $files = append $files (list (printf "link.tls.%s" $key) $path (list "/link/*")) }}{{ end }}
{{- range $config.ray }}{{ with .token_file }}{{ $files = append $files (list "ray.token_file" . (list "/secrets/ray-token")) }}{{ end }}{{ end }}
{{- with dig "weights" "hugging_face" dict $config | default dict }}{{ with .token_file }}{{ $files = append $files (list "weights.hugging_face.token_file" . (list "/secrets/hf-token")) }}{{ end }}{{ end }}
{{- range $file := $files }}
{{- $path := index $file 1 | toString }}{{ $mounted := false }}
{{- range $place := index $file 2 }}
{{- if or (eq $place $path) (and (hasSuffix "/*" $place) (hasPrefix (trimSuffix "*" $place) $path)) }}{{ $mounted = true }}{{ end }}
{{- end }}
{{- if and $path (not $mounted) }}
{{- fail (printf "config.%s is %s, which no volume of the pods that read it holds: there are %s; for another one of a gateway's set gateway.extraVolumes and extraVolumeMounts" (index $file 0) $path (index $file 2 | join ", ")) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* weight: annotations of the hooks that `helm test` runs. */ -}}
{{- define "headrace.testHook" -}}
helm.sh/hook: test
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{- /* (list root cluster): whether the worker groups of a Ray cluster can hold the least replicas of all its models at
the same time, by type of GPU and in all. A model that may run on several types, or on any, counts in all. */ -}}
{{- define "headrace.checkGroupSums" -}}
{{- $root := index . 0 }}{{ $cluster := index . 1 }}
{{- $first := dict }}{{ with $root.Values.config.ray }}{{ $first = first . }}{{ end }}
{{- $need := dict "" 0 }}{{ $have := dict "" 0 }}
{{- range $group := $cluster.workerGroups }}
{{- $node := add (int ($group.gpusPerNode | default 0)) (int ($group.logicalGpus | default 0)) }}
{{- $gpus := mul $node (int $group.maxReplicas) (int ($group.numOfHosts | default 1)) }}
{{- $type := $group.gpuType | default "any" | toString }}
{{- $_ := set $have $type (add $gpus (get $have $type | default 0)) }}
{{- $_ := set $have "" (add $gpus (get $have "")) }}
{{- end }}
{{- range $model := $root.Values.config.models }}
{{- if and (eq $cluster.name ($model.ray | default (get $first "name"))) (not (hasPrefix "sim://" ($model.source | toString))) }}
{{- $choices := list }}
{{- if kindIs "slice" $model.gpu }}{{ $choices = $model.gpu }}{{ else }}{{ $choices = list (dict "type" ($model.gpu | default "")) }}{{ end }}
{{- $least := 0 }}
{{- range $choice := $choices }}
{{- $ranks := mul (int ($choice.tensor_parallel_size | default $model.tensor_parallel_size | default 1)) (int ($choice.pipeline_parallel_size | default $model.pipeline_parallel_size | default 1)) }}
{{- $least = ternary $ranks (min $least $ranks) (eq (int $least) 0) }}
{{- end }}
{{- $gpus := mul $least (int (dig "min" 1 ($model.replicas | default dict))) }}
{{- $_ := set $need "" (add $gpus (get $need "")) }}
{{- if and (eq (len $choices) 1) (first $choices).type }}
{{- $type := (first $choices).type | toString }}
{{- $_ := set $need $type (add $gpus (get $need $type | default 0)) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $type := keys $need | sortAlpha | reverse }}
{{- if gt (int (get $need $type)) (int (get $have $type | default 0)) }}
{{- fail (printf "config.models: at replicas.min they need %d GPUs%s together, and the worker groups of ray.clusters[%s] have %d at most, %d too few: raise maxReplicas, or lower replicas.min" (int (get $need $type)) (ternary (printf " of type %s" $type) "" (ne $type "")) $cluster.name (int (get $have $type | default 0)) (sub (int (get $need $type)) (int (get $have $type | default 0)))) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* A quantity of Kubernetes, such as 500m or 16Gi, as a number. */ -}}
{{- define "headrace.quantity" -}}
{{- $text := toString . }}
{{- $unit := regexFind "[a-zA-Z]*$" $text }}
{{- $factors := dict "" 1.0 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 "E" 1e18 "Ei" 1152921504606846976.0 }}
{{- mulf (float64 (trimSuffix $unit $text)) (get $factors $unit | default 1.0) }}
{{- end }}

{{- /* (list path resources): requests may not exceed limits. */ -}}
{{- define "headrace.checkResources" -}}
{{- $path := index . 0 }}{{ $resources := index . 1 | default dict }}
{{- $limits := $resources.limits | default dict }}
{{- range $name, $request := $resources.requests | default dict }}
{{- $limit := get $limits $name }}
{{- if and (ne (toString $limit) "") (ne (toString $request) "<nil>") (ne (toString $limit) "<nil>") }}
{{- if gt (float64 (include "headrace.quantity" $request)) (float64 (include "headrace.quantity" $limit)) }}
{{- fail (printf "%s.requests.%s is %s, above the limit of %s: raise limits.%s, or lower the request" $path $name (toString $request) (toString $limit) $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
