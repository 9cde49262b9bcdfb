"""The service: banks over HTTP, for the clients of OpenAI and MCP, and for people."""
