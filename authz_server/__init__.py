"""An external-authorization (ext_authz v3) server for Istio: who is asking, may they, where do they go."""
