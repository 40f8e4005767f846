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
      args: [pod, controller, -f, /etc/headrace/cluster.yaml, --folder, /var/lib/headrace/controller, --health, "0.0.0.0:{{ include "headrace.probePort" . }}", --lease, {{ $name }}-controller]
      env:
        - {name: HEADRACE_CONFIG, value: /etc/headrace/cluster.yaml}
        - {name: HEADRACE_CACHE_DIR, value: /var/lib/headrace/cache}
        - {name: HOME, value: /tmp}
        - {name: RAY_AUTH_MODE, value: token}
        - {name: RAY_AUTH_TOKEN_PATH, value: /secrets/ray-token}
        {{- with $controller.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
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
