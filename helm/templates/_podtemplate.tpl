{{- /* (list root text template where container): the pod that `text` holds as YAML, with the value `podTemplate` merged
over it. `container` is the chart's container in the pod. */ -}}
{{- define "headrace.pod" -}}
{{- $template := index . 2 -}}
{{- if $template -}}
{{- $pod := index . 1 | fromYaml -}}
{{- include "headrace.checkPodTemplate" (list (index . 0) $pod $template (index . 3) (index . 4)) -}}
{{- include "headrace.overlay" (list $pod $template) -}}
{{- if and $pod.spec.hostNetwork (not $pod.spec.dnsPolicy) -}}
{{- /* With the node's own resolver no Service of the cluster has an address. */ -}}
{{- $_ := set $pod.spec "dnsPolicy" "ClusterFirstWithHostNet" -}}
{{- end -}}
{{- toYaml $pod -}}
{{- else -}}
{{- index . 1 -}}
{{- end -}}
{{- end }}

{{- /* (list base over): merge `over` into `base` in place, like a strategic merge patch of Kubernetes: mappings are
merged, lists of named items are merged by name, tolerations are added, null removes a key, all else is replaced. */ -}}
{{- define "headrace.overlay" -}}
{{- $base := index . 0 -}}
{{- $names := dict "containers" "name" "initContainers" "name" "env" "name" "volumes" "name" "imagePullSecrets" "name" "resourceClaims" "name" "volumeMounts" "mountPath" "volumeDevices" "devicePath" "ports" "containerPort" "topologySpreadConstraints" "topologyKey" "hostAliases" "ip" -}}
{{- range $key, $value := index . 1 -}}
{{- $old := get $base $key -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $base $key -}}
{{- else if and (kindIs "map" $value) (kindIs "map" $old) -}}
{{- include "headrace.overlay" (list $old $value) -}}
{{- else if and (kindIs "slice" $value) (kindIs "slice" $old) (hasKey $names $key) -}}
{{- $by := get $names $key -}}
{{- $items := list -}}{{- $known := dict -}}
{{- range $item := $old -}}
{{- $id := get $item $by | toString -}}
{{- $_ := set $known $id true -}}
{{- range $new := $value -}}
{{- if eq (get $new $by | toString) $id -}}
{{- if has $key (list "containers" "initContainers") -}}{{- include "headrace.overlay" (list $item $new) -}}{{- else -}}{{- $item = $new -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- $items = append $items $item -}}
{{- end -}}
{{- range $new := $value -}}
{{- if not (hasKey $known (get $new $by | toString)) -}}{{- $items = append $items $new -}}{{- end -}}
{{- end -}}
{{- $_ := set $base $key $items -}}
{{- else if and (eq $key "tolerations") (kindIs "slice" $old) -}}
{{- $_ := set $base $key (concat $old $value) -}}
{{- else -}}
{{- $_ := set $base $key $value -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- /* (list root pod template where container): refuse what would break a pod of the chart. Unknown fields, and fields
that no pod of the chart may have, are refused by values.schema.json. */ -}}
{{- define "headrace.checkPodTemplate" -}}
{{- $root := index . 0 }}{{ $pod := index . 1 }}{{ $template := index . 2 }}{{ $where := index . 3 }}{{ $main := index . 4 }}
{{- $metadata := $template.metadata | default dict }}{{ $spec := $template.spec | default dict }}
{{- range $label, $_ := $metadata.labels }}
{{- if or (has $label (list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" "headrace/worker-group")) (hasPrefix "ray.io/" $label) }}
{{- fail (printf "%s.metadata.labels: %s selects the pods of this release: remove it, or use another label" $where $label) }}
{{- end }}
{{- end }}
{{- range $name, $_ := $metadata.annotations }}
{{- if eq $name "headrace/config" }}
{{- fail (printf "%s.metadata.annotations: headrace/config restarts the pods after a change of the configuration: remove it" $where) }}
{{- end }}
{{- end }}
{{- $least := int ($pod.spec.terminationGracePeriodSeconds | default 0) }}
{{- if and (hasKey $spec "terminationGracePeriodSeconds") (lt (int $spec.terminationGracePeriodSeconds) $least) }}
{{- fail (printf "%s.spec.terminationGracePeriodSeconds is %d, and the pod drains for up to %d s: set at least %d, or lower config.gateway.drain_timeout_s" $where (int $spec.terminationGracePeriodSeconds) $least $least) }}
{{- end }}
{{- if and $spec.serviceAccountName (or (eq $main "controller") (not $pod.spec.serviceAccountName)) }}
{{- fail (printf "%s.spec.serviceAccountName: the rights of this pod belong to its own service account: annotate it by serviceAccount.annotations, or set the name of a worker group" $where) }}
{{- end }}
{{- if and (eq $main "controller") (hasKey $spec "automountServiceAccountToken") (not $spec.automountServiceAccountToken) }}
{{- fail (printf "%s.spec.automountServiceAccountToken is false, and the controller needs the token for its Lease: remove it" $where) }}
{{- end }}
{{- if and $spec.hostNetwork $root.Values.networkPolicy.enabled }}
{{- if not (hasPrefix "ray-" $main) }}
{{- fail (printf "%s.spec.hostNetwork: network policies cannot tell such a pod from others on its node: remove it, or set networkPolicy.enabled to false" $where) }}
{{- else if not $root.Values.networkPolicy.nodes }}
{{- fail (printf "%s.spec.hostNetwork: the pod has its node's address, which the network policies refuse: name the nodes' addresses in networkPolicy.nodes, e.g. [10.0.0.0/16]" $where) }}
{{- end }}
{{- end }}
{{- $volumes := dict }}{{ range $pod.spec.volumes }}{{ $_ := set $volumes .name true }}{{ end }}
{{- if eq $main "gateway" }}{{ $_ := set $volumes "data" true }}{{ end }}
{{- range $spec.volumes }}
{{- if and (hasKey $volumes .name) (ne .name "models") }}
{{- fail (printf "%s.spec.volumes: the volume %s is the chart's own: choose another name (only models may be replaced; sizes are values of their own)" $where .name) }}
{{- end }}
{{- end }}
{{- $own := first $pod.spec.containers }}
{{- $remedies := dict "command" "the chart starts the program" "args" "the chart starts the program" "envFrom" "a name in it could override one that the chart sets: name variables in env" }}
{{- range $container := $spec.containers }}
{{- $here := printf "%s.spec.containers[%s]" $where $container.name }}
{{- if ne $container.name $main }}
{{- if not $container.image }}
{{- fail (printf "%s has no image: the chart's container in this pod is %s; another one needs an image" $here $main) }}
{{- end }}
{{- else }}
{{- range $key, $why := $remedies }}
{{- if hasKey $container $key }}{{ fail (printf "%s.%s: %s: remove it" $here $key $why) }}{{ end }}
{{- end }}
{{- if and $container.image (ne $main "ray-worker") }}
{{- fail (printf "%s.image: set image.%s, or ray.clusters[].image" $here (ternary "worker" $main (hasPrefix "ray-" $main))) }}
{{- end }}
{{- range list "requests" "limits" }}
{{- if hasKey ($container.resources | default dict) . }}
{{- fail (printf "%s.resources.%s: set `resources` beside podTemplate: Ray's resources and the disk request follow it" $here .) }}
{{- end }}
{{- end }}
{{- if and $own.lifecycle (hasKey ($container.lifecycle | default dict) "preStop") }}
{{- fail (printf "%s.lifecycle.preStop: the chart's own drains the pod: remove it" $here) }}
{{- end }}
{{- range $probe := list "startupProbe" "readinessProbe" "livenessProbe" }}
{{- range list "grpc" "exec" "httpGet" "tcpSocket" }}
{{- if and (hasKey $own $probe) (hasKey (get $container $probe | default dict) .) }}
{{- fail (printf "%s.%s.%s: a probe has one handler, which the chart sets: change only its times" $here $probe .) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $container.env }}
{{- if has .name (list "HOME" "HEADRACE_CONFIG" "HEADRACE_CACHE_DIR" "HEADRACE_LOG_LEVEL" "HEADRACE_LOG_COPY" "HEADRACE_DATABASE_PASSWORD" "POD_NAME" "NODE_NAME" "RAY_AUTH_MODE" "RAY_AUTH_TOKEN" "RAY_AUTH_TOKEN_PATH" "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") }}
{{- fail (printf "%s.env: %s is set by the chart: remove it" $here .name) }}
{{- end }}
{{- end }}
{{- range $mount := $container.volumeMounts }}
{{- range $own.volumeMounts }}
{{- if eq (trimSuffix "/" .mountPath) (trimSuffix "/" $mount.mountPath) }}
{{- fail (printf "%s.volumeMounts: %s is a folder of the chart's own: choose another one, or one below it" $here $mount.mountPath) }}
{{- end }}
{{- end }}
{{- end }}
{{- range $port := $container.ports }}
{{- range $own.ports }}
{{- if or (eq (int .containerPort) (int $port.containerPort)) (eq .name ($port.name | default "")) }}
{{- fail (printf "%s.ports: %s (%d) is a port of the chart's own: choose another name and number" $here .name (int .containerPort)) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
