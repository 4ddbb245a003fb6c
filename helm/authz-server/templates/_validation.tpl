{{- /*
Rules between values, which a schema cannot tell. Each names the values and how to mend them; all that are broken are
told at once.
*/ -}}
{{- define "authz-server.problems" -}}
{{- $problems := list -}}
{{- with .Values -}}

{{- $stores := list -}}
{{- if .redis.url -}}{{- $stores = append $stores "redis.url" -}}{{- end -}}
{{- if .redis.sentinel.nodes -}}{{- $stores = append $stores "redis.sentinel.nodes" -}}{{- end -}}
{{- if .redis.cluster.nodes -}}{{- $stores = append $stores "redis.cluster.nodes" -}}{{- end -}}
{{- if .evaluation.enabled -}}{{- $stores = append $stores "evaluation.enabled (which brings a Valkey of its own)" -}}{{- end -}}
{{- if not $stores -}}
{{- $problems = append $problems "redis: name the Redis that holds the policy by url, such as redis://redis.example.svc:6379/0, or by sentinel.nodes or cluster.nodes (or try things out with evaluation.enabled)" -}}
{{- else if gt (len $stores) 1 -}}
{{- $problems = append $problems (printf "%s: there is one store; leave the others out" (join " and " $stores)) -}}
{{- end -}}
{{- if and .evaluation.enabled (or .redis.username .redis.existingSecret .redis.jobs.username .redis.tls.enabled .redis.tls.caSecret .redis.tls.clientSecret) -}}
{{- $problems = append $problems "evaluation.enabled brings a Valkey without users, passwords and TLS: leave redis.username, redis.existingSecret, redis.jobs and redis.tls out" -}}
{{- end -}}
{{- if ne (empty .redis.jobs.username) (empty .redis.jobs.existingSecret) -}}
{{- $problems = append $problems "redis.jobs.username and redis.jobs.existingSecret belong together: jobs either use the server's user, or one of their own with its password" -}}
{{- end -}}
{{- if regexMatch "^[a-z+]+://[^/?]*@" .redis.url -}}
{{- $problems = append $problems "redis.url holds a user or a password: put the user into redis.username and the password into a Secret that redis.existingSecret names" -}}
{{- end -}}
{{- if and .redis.url (not (regexMatch "^rediss?://" .redis.url)) -}}
{{- $problems = append $problems (printf "redis.url is %s: it must begin with redis:// (rediss:// for TLS)" .redis.url) -}}
{{- end -}}
{{- if and .redis.tls.enabled .redis.url -}}
{{- $problems = append $problems "redis.tls.enabled is for sentinel.nodes and cluster.nodes: with redis.url write rediss:// instead" -}}
{{- end -}}
{{- if and (or .redis.tls.caSecret .redis.tls.clientSecret) $stores (not .redis.tls.enabled) (not (hasPrefix "rediss" .redis.url)) (not .evaluation.enabled) -}}
{{- $problems = append $problems "redis.tls.caSecret or redis.tls.clientSecret is set, but Redis is asked without TLS: write rediss:// in redis.url, or set redis.tls.enabled with sentinel.nodes or cluster.nodes" -}}
{{- end -}}
{{- if and (or .redis.sentinel.username .redis.sentinel.existingSecret) (not .redis.sentinel.nodes) -}}
{{- $problems = append $problems "redis.sentinel.username or redis.sentinel.existingSecret is set, but redis.sentinel.nodes is empty" -}}
{{- end -}}

{{- if le (int .drain.seconds) (int .drain.endpointPropagationSeconds) -}}
{{- $problems = append $problems (printf "drain.seconds (%d) must be more than drain.endpointPropagationSeconds (%d): gateways would call a pod that no longer answers" (int .drain.seconds) (int .drain.endpointPropagationSeconds)) -}}
{{- end -}}
{{- $leaving := add .drain.seconds .drain.graceSeconds -}}
{{- if and .drain.terminationGracePeriodSeconds (le (int64 .drain.terminationGracePeriodSeconds) $leaving) -}}
{{- $problems = append $problems (printf "drain.terminationGracePeriodSeconds (%d) must be more than drain.seconds and drain.graceSeconds together (%d): Kubernetes would kill a pod that still answers" (int .drain.terminationGracePeriodSeconds) (int $leaving)) -}}
{{- end -}}

{{- if and .snapshotFile.persistence.enabled (not .snapshotFile.enabled) -}}
{{- $problems = append $problems "snapshotFile.persistence.enabled, but snapshotFile.enabled is not: there would be volumes and nothing to keep on them" -}}
{{- end -}}

{{- if and .autoscaling.enabled (kindIs "invalid" .replicas | not) -}}
{{- $problems = append $problems (printf "replicas (%d) is set and autoscaling.enabled: every upgrade would undo what the autoscaler chose; set replicas to null" (int .replicas)) -}}
{{- end -}}
{{- if and (not .autoscaling.enabled) (kindIs "invalid" .replicas) -}}
{{- $problems = append $problems "replicas is null, and autoscaling is not enabled: say how many pods there shall be" -}}
{{- end -}}
{{- if and .autoscaling.enabled (gt (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas)) -}}
{{- $problems = append $problems (printf "autoscaling.minReplicas (%d) is more than autoscaling.maxReplicas (%d)" (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and .podDisruptionBudget.enabled (kindIs "float64" .podDisruptionBudget.maxUnavailable) (ge (int .podDisruptionBudget.maxUnavailable) (int (ternary .autoscaling.minReplicas .replicas .autoscaling.enabled))) (gt (int (ternary .autoscaling.minReplicas .replicas .autoscaling.enabled)) 1) -}}
{{- $problems = append $problems (printf "podDisruptionBudget.maxUnavailable (%d) would let every pod be away at once" (int .podDisruptionBudget.maxUnavailable)) -}}
{{- end -}}

{{- if eq (int .ports.grpc) (int .ports.admin) -}}
{{- $problems = append $problems (printf "ports.grpc and ports.admin are both %d: two ports are needed" (int .ports.grpc)) -}}
{{- end -}}
{{- if and .tls.enabled (not .tls.secretName) -}}
{{- $problems = append $problems "tls.enabled needs tls.secretName, a Secret with tls.crt and tls.key" -}}
{{- end -}}
{{- if and (not .tls.enabled) (or .tls.secretName .tls.mutual) -}}
{{- $problems = append $problems "tls.secretName or tls.mutual is set, but tls.enabled is not" -}}
{{- end -}}
{{- if and .tls.enabled .tls.mutual .tests.enabled (not .tests.clientSecretName) -}}
{{- $problems = append $problems "tls.mutual: `helm test` needs a certificate of its own; name its Secret in tests.clientSecretName, or switch tests.enabled off" -}}
{{- end -}}

{{- $mode := .istio.destinationRule.tls.mode | default "" -}}
{{- if .istio.enabled -}}
{{- if and .tls.enabled .istio.sidecar -}}
{{- $problems = append $problems "tls.enabled and istio.sidecar: the sidecar would refuse, or hide, the server's own TLS; set istio.sidecar to false, or leave TLS to the mesh" -}}
{{- end -}}
{{- if and (not .tls.enabled) (not .istio.sidecar) -}}
{{- $problems = append $problems "neither tls.enabled nor istio.sidecar: checks, which hold every header, would travel in plain text, and anybody could ask" -}}
{{- end -}}
{{- if and .tls.enabled .istio.destinationRule.enabled (not (has $mode (list "SIMPLE" "MUTUAL"))) -}}
{{- $problems = append $problems "tls.enabled: gateways must know how to connect; set istio.destinationRule.tls with mode SIMPLE or MUTUAL" -}}
{{- end -}}
{{- if and .tls.enabled .tls.mutual .istio.destinationRule.enabled (ne $mode "MUTUAL") -}}
{{- $problems = append $problems "tls.mutual: gateways must show a certificate; set istio.destinationRule.tls.mode to MUTUAL" -}}
{{- end -}}
{{- if and (not .tls.enabled) .istio.destinationRule.tls -}}
{{- $problems = append $problems "istio.destinationRule.tls is set, but tls.enabled is not: leave it empty, the mesh's own TLS is used" -}}
{{- end -}}
{{- if and .istio.provider.failOpen (not (kindIs "invalid" .istio.provider.statusOnError)) -}}
{{- $problems = append $problems "istio.provider.failOpen and istio.provider.statusOnError: a request that passes has no error status; choose one of them" -}}
{{- end -}}
{{- if and .istio.provider.failOpen (not .istio.stripHeaders.enabled) -}}
{{- $problems = append $problems "istio.provider.failOpen without istio.stripHeaders: while no server can decide, clients would choose their instance by a header of their own" -}}
{{- end -}}
{{- if and .istio.customPolicy.exemptPaths (not .istio.stripHeaders.enabled) -}}
{{- $problems = append $problems "istio.customPolicy.exemptPaths without istio.stripHeaders: on these paths clients would choose their instance by a header of their own" -}}
{{- end -}}
{{- if and .istio.gateway.proxyProtocol (gt (int .istio.gateway.trustedHops) 0) -}}
{{- $problems = append $problems (printf "istio.gateway.proxyProtocol and istio.gateway.trustedHops (%d): behind PROXY protocol the client is the connection's peer, and with trusted hops it could choose its address by X-Forwarded-For; set trustedHops to 0" (int .istio.gateway.trustedHops)) -}}
{{- end -}}
{{- if and .istio.gateway.proxyProtocol .settings.trusted_peers -}}
{{- $problems = append $problems "istio.gateway.proxyProtocol and settings.trusted_peers: behind PROXY protocol the peer is the client itself, so nobody outside these networks would be let in; leave trusted_peers out" -}}
{{- end -}}
{{- end -}}

{{- end -}}
{{- range $problems }}
- {{ . }}
{{- end -}}
{{- end }}

{{- define "authz-server.validate" -}}
{{- with include "authz-server.problems" . -}}
{{- fail (printf "these values do not fit together:%s" .) -}}
{{- end -}}
{{- end }}
