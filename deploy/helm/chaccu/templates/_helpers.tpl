{{- define "chaccu.name" -}}
{{- if contains "chaccu" .Release.Name -}}{{ .Release.Name | trunc 30 | trimSuffix "-" }}{{- else -}}{{ printf "%s-chaccu" (.Release.Name | trunc 23 | trimSuffix "-") }}{{- end -}}
{{- end -}}

{{- define "chaccu.labels" -}}
app.kubernetes.io/name: chaccu
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "chaccu.secret" -}}
{{- .Values.auth.existingSecret | default (include "chaccu.name" .) -}}
{{- end -}}

{{- define "chaccu.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "chaccu.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "chaccu.joinToken" -}}
- name: CHACCU_JOIN_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "chaccu.secret" . }}
      key: join-token
{{- end -}}
