{{- /* (dict root head image scales resources tmp shm): the pod of a Ray head. */ -}}
{{- define "headrace.headPod" -}}
{{- $root := .root }}{{ $head := .head }}{{ $image := .image }}{{ $scales := .scales }}
{{- $name := include "headrace.name" $root }}
metadata:
  labels: {{- include "headrace.podLabels" (list $root "ray") | nindent 4 }}
spec:
  {{- /* Its service account is KubeRay's own where the autoscaler runs: it makes role and binding for it. */}}
  {{- if not $scales }}
  serviceAccountName: {{ $name }}-ray
  automountServiceAccountToken: false
  {{- end }}
  enableServiceLinks: false
  {{- with include "headrace.priority" (list $root "workers" "") }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- include "headrace.pullSecrets" $root | nindent 2 }}
  securityContext: {{- include "headrace.podSecurity" $root | nindent 4 }}
  {{- with $head.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $head.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-head
      image: {{ $image | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      # No replica runs here, so there is nothing to drain: the sooner it ends, the sooner the next head is up.
      env: {{- include "headrace.rayEnv" (list $root $root.Values.ray.extraEnv "0") | nindent 8 }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        - {name: metrics, containerPort: 8080}
      resources: {{- include "headrace.withDisk" (list .resources (list .tmp)) | nindent 8 }}
      securityContext: {{- include "headrace.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ .tmp }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .shm }}}
{{- end }}

{{- /* (dict root group image drain resources shm tmp disk cache cacheKind): a pod of a worker group. */ -}}
{{- define "headrace.workerPod" -}}
{{- $root := .root }}{{ $group := .group }}{{ $image := .image }}{{ $drain := .drain }}{{ $resources := .resources }}
{{- $shm := .shm }}{{ $tmp := .tmp }}{{ $disk := .disk }}{{ $cache := .cache }}{{ $cacheKind := .cacheKind }}
{{- $name := include "headrace.name" $root }}
metadata:
  labels: {{- include "headrace.podLabels" (list $root "ray") | nindent 4 }}
    headrace/worker-group: {{ $group.name | quote }}
spec:
  serviceAccountName: {{ $name }}-ray
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $drain 30 }}
  {{- with include "headrace.priority" (list $root "workers" "") }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- include "headrace.pullSecrets" $root | nindent 2 }}
  securityContext: {{- include "headrace.podSecurity" $root | nindent 4 }}
  {{- with $group.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-worker
      image: {{ $image | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      env: {{- include "headrace.rayEnv" (list $root (include "headrace.groupEnv" (list $root $group) | fromYamlArray) (add $drain 15)) | nindent 8 }}
      ports:
        - {name: metrics, containerPort: 8080}
      lifecycle:
        # Calls have drain_timeout_s to end or move, what closes then 15 s, and Kubernetes waits 15 s more.
        preStop: {exec: {command: [headrace, pod, drain]}}
      resources: {{- include "headrace.withDisk" (list $resources $disk) | nindent 8 }}
      securityContext: {{- include "headrace.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - {name: secrets, mountPath: /secrets, readOnly: true}
        - {name: link, mountPath: /link, readOnly: true}
        - {name: models, mountPath: {{ dig "weights" "cache_dir" "/models" $root.Values.config | default "/models" }}}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    - name: secrets
      secret:
        secretName: {{ include "headrace.tokensSecret" $root | quote }}
        defaultMode: 288
        optional: true    # a token of the model hub is not everybody's
        items: [{key: hf-token, path: hf-token}]
    - name: link
      secret: {secretName: {{ include "headrace.linkSecret" (list $root "worker") | quote }}, defaultMode: 288}
    - name: models
      {{- if eq $cacheKind "pvc" }}
      persistentVolumeClaim: {claimName: {{ $cache.claimName | quote }}}
      {{- else if eq $cacheKind "ephemeral" }}
      ephemeral:
        volumeClaimTemplate:
          spec:
            accessModes: [ReadWriteOnce]
            storageClassName: {{ $cache.storageClassName | quote }}
            resources: {requests: {storage: {{ $cache.size | default "200Gi" }}}}
      {{- else }}
      emptyDir: {sizeLimit: {{ $cache.size | default "200Gi" }}}
      {{- end }}
    - name: tmp
      emptyDir: {sizeLimit: {{ $tmp }}}    # Ray's session and what it spills; compiled kernels
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $shm }}}
{{- end }}

{{- /* The pod of a gateway. */ -}}
{{- define "headrace.gatewayPod" -}}
{{- $name := include "headrace.name" . }}
{{- $gateway := .Values.gateway }}
{{- $stateful := eq $gateway.kind "StatefulSet" }}
{{- $disk := list "256Mi" }}
{{- if not $stateful }}{{ $disk = append $disk $gateway.storage.size }}{{ end }}
metadata:
  labels: {{- include "headrace.podLabels" (list . "gateway") | nindent 4 }}
  annotations:
    headrace/config: {{ include "headrace.gatewayChecksum" . }}
    {{- with $gateway.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ $name }}-gateway
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with include "headrace.priority" (list . "serving" $gateway.priorityClassName) }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- include "headrace.pullSecrets" . | nindent 2 }}
  securityContext: {{- include "headrace.podSecurity" . | nindent 4 }}
  terminationGracePeriodSeconds: {{ add (include "headrace.drainSeconds" . | int) 30 }}
  topologySpreadConstraints:
    {{- range $gateway.topologyKeys }}
    - maxSkew: 1
      topologyKey: {{ . | quote }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "headrace.selector" (list $ "gateway") | nindent 10 }}
    {{- end }}
  {{- with $gateway.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $gateway.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $gateway.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: gateway
      image: {{ include "headrace.ownImage" (list . "gateway") | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [headrace]
      args: [pod, gateway, -f, /etc/headrace/cluster.yaml, --folder, /var/lib/headrace/gateway, --health, "0.0.0.0:{{ include "headrace.probePort" . }}"]
      env:
        - {name: HEADRACE_CONFIG, value: /etc/headrace/cluster.yaml}
        - {name: HEADRACE_CACHE_DIR, value: /var/lib/headrace/cache}
        - {name: HOME, value: /tmp}
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        - name: HEADRACE_DATABASE_PASSWORD
          valueFrom: {secretKeyRef: {name: {{ include "headrace.secret" . | quote }}, key: database-password}}
        {{- with $gateway.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- range list "grpc" "http" "link" "admin" "metrics" }}
        - {name: {{ . }}, containerPort: {{ include "headrace.port" (list $ .) }}}
        {{- end }}
        - {name: health, containerPort: {{ include "headrace.probePort" . }}}
      startupProbe:
        grpc: {port: {{ include "headrace.probePort" . }}}
        periodSeconds: 2
        failureThreshold: 60
      # Whether it takes calls, and nothing about links: a gateway without workers queues, and says why it waits.
      readinessProbe:
        grpc: {port: {{ include "headrace.probePort" . }}, service: cluster.v1.Inference}
        periodSeconds: 5
        failureThreshold: 2
      livenessProbe:
        grpc: {port: {{ include "headrace.probePort" . }}}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      lifecycle:
        preStop: {sleep: {seconds: 5}}    # until every balancer has heard that it leaves
      resources: {{- include "headrace.withDisk" (list $gateway.resources $disk) | nindent 8 }}
      securityContext: {{- include "headrace.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/headrace, readOnly: true}
        - {name: secrets, mountPath: /secrets, readOnly: true}
        - {name: tls, mountPath: /tls, readOnly: true}
        - {name: link, mountPath: /link, readOnly: true}
        - {name: revoked, mountPath: /revoked, readOnly: true}
        - {name: data, mountPath: /var/lib/headrace}
        - {name: tmp, mountPath: /tmp}
        {{- with $gateway.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - {{- include "headrace.configVolume" . | nindent 6 }}
    - name: secrets
      secret:
        secretName: {{ include "headrace.secret" . | quote }}
        defaultMode: 288
        items: [{key: cluster, path: cluster}, {key: key-pepper, path: key-pepper}]
    - name: tls
      secret: {secretName: {{ .Values.tls.existingSecret | default (printf "%s-tls" $name) | quote }}, defaultMode: 288}
    - name: link
      secret: {secretName: {{ include "headrace.linkSecret" (list . "gateway") | quote }}, defaultMode: 288}
    - name: revoked
      configMap: {name: {{ $name }}-revoked}
    - name: tmp
      emptyDir: {sizeLimit: 256Mi}
    {{- if not $stateful }}
    - name: data
      emptyDir: {sizeLimit: {{ $gateway.storage.size }}}
    {{- end }}
    {{- with $gateway.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{- /* The pod of a controller. */ -}}
{{- define "headrace.controllerPod" -}}
{{- $name := include "headrace.name" . }}
{{- $controller := .Values.controller }}
metadata:
  labels: {{- include "headrace.podLabels" (list . "controller") | nindent 4 }}
  annotations:
    headrace/config: {{ toYaml .Values.config | sha256sum }}
    {{- with $controller.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ $name }}-controller
  automountServiceAccountToken: true    # for its Lease
  enableServiceLinks: false
  {{- with include "headrace.priority" (list . "serving" "") }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- include "headrace.pullSecrets" . | nindent 2 }}
  securityContext: {{- include "headrace.podSecurity" . | nindent 4 }}
  terminationGracePeriodSeconds: 30
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "headrace.selector" (list . "controller") | nindent 10 }}
  {{- with $controller.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $controller.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $controller.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: controller
      image: {{ include "headrace.ownImage" (list . "controller") | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [headrace]
      args: [pod, controller, -f, /etc/headrace/cluster.yaml, --folder, /var/lib/headrace/controller, --health, "0.0.0.0:{{ include "headrace.probePort" . }}", --metrics, "0.0.0.0:{{ include "headrace.controllerMetricsPort" . }}", --lease, {{ $name }}-controller]
      env:
        - {name: HEADRACE_CONFIG, value: /etc/headrace/cluster.yaml}
        - {name: HEADRACE_CACHE_DIR, value: /var/lib/headrace/cache}
        - {name: HOME, value: /tmp}
        - {name: RAY_AUTH_MODE, value: token}
        - {name: RAY_AUTH_TOKEN_PATH, value: /secrets/ray-token}
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        {{- with $controller.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: metrics, containerPort: {{ include "headrace.controllerMetricsPort" . }}}
        - {name: health, containerPort: {{ include "headrace.probePort" . }}}
      startupProbe:
        grpc: {port: {{ include "headrace.probePort" . }}}
        periodSeconds: 2
        failureThreshold: 60
      readinessProbe:
        grpc: {port: {{ include "headrace.probePort" . }}}
      livenessProbe:
        grpc: {port: {{ include "headrace.probePort" . }}}
        timeoutSeconds: 5
        failureThreshold: 6
      resources: {{- include "headrace.withDisk" (list $controller.resources (list "1Gi" "256Mi")) | nindent 8 }}
      securityContext: {{- include "headrace.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/headrace, readOnly: true}
        - {name: secrets, mountPath: /secrets, readOnly: true}
        - {name: link, mountPath: /link, readOnly: true}
        - {name: data, mountPath: /var/lib/headrace}
        - {name: tmp, mountPath: /tmp}
  volumes:
    - {{- include "headrace.configVolume" . | nindent 6 }}
    - name: secrets
      secret:
        secretName: {{ include "headrace.secret" . | quote }}
        defaultMode: 288
        items: [{key: auth_token, path: ray-token}]
    - name: link
      secret: {secretName: {{ include "headrace.linkSecret" (list . "controller") | quote }}, defaultMode: 288}
    - name: data
      emptyDir: {sizeLimit: 1Gi}
    - name: tmp
      emptyDir: {sizeLimit: 256Mi}
{{- end }}

{{- /* The pod of the Job that makes the ledger's tables. It reaches the database as gateways do: with their volumes. */ -}}
{{- define "headrace.databasePod" -}}
{{- $name := include "headrace.name" . }}
metadata:
  labels: {{- include "headrace.podLabels" (list . "database") | nindent 4 }}
spec:
  restartPolicy: OnFailure
  serviceAccountName: {{ $name }}-gateway
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- include "headrace.pullSecrets" . | nindent 2 }}
  securityContext: {{- include "headrace.podSecurity" . | nindent 4 }}
  {{- with .Values.gateway.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.gateway.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: database
      image: {{ include "headrace.ownImage" (list . "gateway") | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [headrace]
      args: [db, upgrade, --database-url, {{ .Values.config.store.database_url | quote }}]
      env:
        - {name: HOME, value: /tmp}
        - {name: HEADRACE_CACHE_DIR, value: /tmp/headrace}
        - name: HEADRACE_DATABASE_PASSWORD
          valueFrom: {secretKeyRef: {name: {{ include "headrace.secret" . | quote }}, key: database-password}}
        {{- with .Values.gateway.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources:
        requests: {cpu: 100m, memory: 256Mi, ephemeral-storage: 128Mi}
        limits: {memory: 512Mi}
      securityContext: {{- include "headrace.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- with .Values.gateway.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: 64Mi}
    {{- with .Values.gateway.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{- /* The pod of the Job that checks the configuration. */ -}}
{{- define "headrace.checkPod" -}}
{{- $name := printf "%s-check" (include "headrace.name" .) }}
metadata:
  labels: {{- include "headrace.podLabels" (list . "check") | nindent 4 }}
spec:
  restartPolicy: Never
  serviceAccountName: {{ $name }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- include "headrace.pullSecrets" . | nindent 2 }}
  securityContext: {{- include "headrace.podSecurity" . | nindent 4 }}
  {{- with .Values.gateway.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.gateway.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: check
      image: {{ include "headrace.ownImage" (list . "gateway") | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [headrace]
      args: [config, check, --pod, /etc/headrace/cluster.yaml]
      env:
        - {name: HOME, value: /tmp}
        - {name: HEADRACE_CACHE_DIR, value: /tmp/headrace}
      terminationMessagePolicy: FallbackToLogsOnError    # `kubectl describe pod` shows what is wrong
      resources:
        requests: {cpu: 100m, memory: 128Mi, ephemeral-storage: 64Mi}
        limits: {memory: 512Mi}
      securityContext: {{- include "headrace.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/headrace, readOnly: true}
        - {name: tmp, mountPath: /tmp}
  volumes:
    - name: config
      {{- if include "headrace.configIsSecret" . }}
      secret: {secretName: {{ $name }}, defaultMode: 288}
      {{- else }}
      configMap: {name: {{ $name }}}
      {{- end }}
    - name: tmp
      emptyDir: {sizeLimit: 64Mi}
{{- end }}

{{- /* The pod of a backup: pg_dump writes a file to the volume, and `upload` may copy it elsewhere. */ -}}
{{- define "headrace.backupPod" -}}
{{- $backup := .Values.backup }}
{{- $url := regexReplaceAll "^postgresql(\\+[a-z0-9_]+)?:" .Values.config.store.database_url "postgresql:" }}
metadata:
  labels: {{- include "headrace.podLabels" (list . "backup") | nindent 4 }}
spec:
  restartPolicy: OnFailure
  serviceAccountName: {{ include "headrace.name" . }}-gateway
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- include "headrace.pullSecrets" . | nindent 2 }}
  securityContext: {{- include "headrace.podSecurity" . | nindent 4 }}
  {{- with .Values.gateway.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.gateway.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{ ternary "initContainers" "containers" (not (empty $backup.upload)) }}:
    - name: backup
      image: {{ include "headrace.image" (list . $backup.image "" "") | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [sh, -euc]
      args:
        - |
          file="$FOLDER/headrace-$(date -u +%Y%m%dT%H%M%SZ).dump"
          trap 'rm -f "$file.partial"' EXIT
          pg_dump --format=custom --no-owner --no-privileges --file="$file.partial" "$DATABASE_URL"
          pg_restore --list "$file.partial" > /dev/null
          mv "$file.partial" "$file"
          ls "$FOLDER"/headrace-*.dump | sort -r | tail -n +$((KEEP + 1)) | while read -r old; do rm -- "$old"; done
          ls -l "$FOLDER"
      env:
        {{- with .Values.gateway.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        - {name: HOME, value: /tmp}
        - {name: FOLDER, value: /backup}
        - {name: KEEP, value: {{ int $backup.keep | quote }}}
        - {name: DATABASE_URL, value: {{ $url | quote }}}
        - name: PGPASSWORD
          valueFrom: {secretKeyRef: {name: {{ include "headrace.secret" . | quote }}, key: database-password}}
      resources: {{- include "headrace.withDisk" (list $backup.resources (list "64Mi")) | nindent 8 }}
      securityContext: {{- include "headrace.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: backup, mountPath: /backup}
        - {name: tmp, mountPath: /tmp}
        {{- with .Values.gateway.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  {{- with $backup.upload }}
  containers:
    - name: upload
      image: {{ include "headrace.image" (list $ .image "" "") | quote }}
      imagePullPolicy: {{ $.Values.image.pullPolicy }}
      {{- with .command }}
      command: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .args }}
      args: {{- toYaml . | nindent 8 }}
      {{- end }}
      env:
        - {name: HOME, value: /tmp}
        {{- with .env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources: {{- include "headrace.withDisk" (list $backup.resources (list "64Mi")) | nindent 8 }}
      securityContext: {{- include "headrace.containerSecurity" $ | nindent 8 }}
      volumeMounts:
        - {name: backup, mountPath: /backup, readOnly: true}
        - {name: tmp, mountPath: /tmp}
  {{- end }}
  volumes:
    - name: backup
      persistentVolumeClaim: {claimName: {{ $backup.storage.claimName | default (printf "%s-backup" (include "headrace.name" .)) | quote }}}
    - name: tmp
      emptyDir: {sizeLimit: 64Mi}
    {{- with .Values.gateway.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{- /* (list root text container): the pod of a Job, with what concerns Jobs too of gateway.podTemplate: where it runs, as
whom, and for the Jobs that use the database the volumes, mounts and variables. */ -}}
{{- define "headrace.jobPod" -}}
{{- $root := index . 0 }}{{ $container := index . 2 }}
{{- $given := dig "spec" dict ($root.Values.gateway.podTemplate | default dict) }}
{{- $spec := pick $given "nodeSelector" "tolerations" "runtimeClassName" "schedulerName" "imagePullSecrets" "securityContext" "dnsConfig" "dnsPolicy" "hostAliases" }}
{{- if has $container (list "database" "backup") }}
{{- $spec = merge $spec (pick $given "volumes") }}
{{- /* With an upload, the dump runs before it in an init container. */}}
{{- $containers := ternary "initContainers" "containers" (and (eq $container "backup") (not (empty $root.Values.backup.upload))) }}
{{- range $given.containers }}
{{- if eq .name "gateway" }}
{{- $_ := set $spec $containers (list (merge (dict "name" $container) (pick . "volumeMounts" "env" "securityContext"))) }}
{{- end }}
{{- end }}
{{- end }}
{{- $template := dict }}{{ if $spec }}{{ $template = dict "spec" $spec }}{{ end }}
{{- include "headrace.pod" (list $root (index . 1) $template "gateway.podTemplate" $container) }}
{{- end }}

{{- /* The name in the gateways' certificate by which proxies and `helm test` verify it. */ -}}
{{- define "headrace.serverName" -}}
{{- dig "gatewayApi" "backendTLS" "hostname" "" .Values.gateway | default (printf "%s.%s.svc" (include "headrace.name" .) .Release.Namespace) -}}
{{- end }}

{{- /* The pod of `helm test`. */ -}}
{{- define "headrace.testPod" -}}
{{- $name := include "headrace.name" . }}
metadata:
  labels: {{- include "headrace.podLabels" (list . "test") | nindent 4 }}
spec:
  restartPolicy: Never
  serviceAccountName: {{ $name }}-gateway
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- include "headrace.pullSecrets" . | nindent 2 }}
  securityContext: {{- include "headrace.podSecurity" . | nindent 4 }}
  {{- with .Values.gateway.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.gateway.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: test
      image: {{ include "headrace.ownImage" (list . "gateway") | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [python, -c]
      args:
        - |
          import os, socket, ssl, sys
          host, port, name, ca = sys.argv[1:]
          context = ssl.create_default_context(cafile=ca if os.path.exists(ca) else None)
          with context.wrap_socket(socket.create_connection((host, int(port)), 30), server_hostname=name) as tls:
              tls.sendall(f"GET /ready HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
              line = tls.makefile("rb").readline().decode()
          print(f"{host}:{port}, certificate of {name}: {line.strip()}")
          sys.exit(0 if line.split()[1:2] == ["200"] else 1)
        - {{ $name }}.{{ .Release.Namespace }}.svc
        - {{ include "headrace.port" (list . "http") | quote }}
        - {{ include "headrace.serverName" . }}
        - /tls/ca.crt
      env:
        - {name: HOME, value: /tmp}
      terminationMessagePolicy: FallbackToLogsOnError
      resources:
        requests: {cpu: 50m, memory: 64Mi, ephemeral-storage: 64Mi}
        limits: {memory: 256Mi}
      securityContext: {{- include "headrace.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: tls, mountPath: /tls, readOnly: true}
        - {name: tmp, mountPath: /tmp}
  volumes:
    - name: tls
      # Without ca.crt, as from a public authority, the image's own authorities are asked.
      secret: {secretName: {{ .Values.tls.existingSecret | default (printf "%s-tls" $name) | quote }}, defaultMode: 288, optional: true, items: [{key: ca.crt, path: ca.crt}]}
    - name: tmp
      emptyDir: {sizeLimit: 16Mi}
{{- end }}
