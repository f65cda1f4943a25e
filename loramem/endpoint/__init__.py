"""A store answering other programs: over HTTP as OpenAI's API, as tools of an MCP server, as a store of LangGraph."""
