{{/* Labels of everything. */}}
{{- define "express.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/component: serving-engine
{{- end }}

{{/* Labels by which a model's pods are selected: (dict "root" $ "model" $model). */}}
{{- define "express.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
model: {{ .model.name }}
helm-release-name: {{ .root.Release.Name }}
{{- end }}

{{/* Name of a model's objects. */}}
{{- define "express.name" -}}
{{ printf "%s-%s" .root.Release.Name .model.name | trunc 48 | trimSuffix "-" }}
{{- end }}

{{/* GPUs of a pod must be what its parallel sizes need. */}}
{{- define "express.checkGPUs" -}}
{{- $config := .vllmConfig | default dict }}
{{- $wanted := mul ($config.tensorParallelSize | default 1) ($config.pipelineParallelSize | default 1) ($config.dataParallelSize | default 1) }}
{{- if and .requestGPU (ne (int .requestGPU) (int $wanted)) }}
{{- fail (printf "model %s: requestGPU is %v, but tensorParallelSize x pipelineParallelSize x dataParallelSize is %v" .name .requestGPU $wanted) }}
{{- end }}
{{- end }}

{{/* The arguments of `vllm serve`. */}}
{{- define "express.arguments" -}}
{{- $config := .model.vllmConfig | default dict }}
{{- $backend := dig "attentionBackend" "express" .model }}
- {{ .model.modelURL | quote }}
- "--host=0.0.0.0"
- "--port={{ .root.Values.servingEngineSpec.containerPort }}"
- "--served-model-name={{ .model.servedModelName | default .model.name }}"
{{- if $backend }}
- "--attention-backend={{ $backend }}"
{{- end }}
{{- if and (eq $backend "express") .model.express }}
- {{ printf "--additional-config=%s" (dict "express" .model.express | toJson) | squote }}
{{- end }}
{{- range $flag, $key := dict "max-model-len" "maxModelLen" "dtype" "dtype" "tensor-parallel-size" "tensorParallelSize" "pipeline-parallel-size" "pipelineParallelSize" "data-parallel-size" "dataParallelSize" "max-num-seqs" "maxNumSeqs" "gpu-memory-utilization" "gpuMemoryUtilization" }}
{{- with get $config $key }}
- {{ printf "--%s=%v" $flag (kindIs "float64" . | ternary (printf "%g" (float64 .)) .) | quote }}
{{- end }}
{{- end }}
{{- range $config.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}
